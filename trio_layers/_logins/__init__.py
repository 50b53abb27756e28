"""Where users keep their logins: the files of docker and podman, and credential helpers.

It reads files and runs programs; the registry client, which does neither, asks it for a
repository's credentials.
"""
