"""Finds users' logins: the files of docker and podman, and credential helpers.

It reads files and runs programs. The registry client does neither, and asks this room for a
repository's credentials.
"""
