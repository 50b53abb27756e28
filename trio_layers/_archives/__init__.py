"""Image archives and OCI layouts, into and out of the store.

Like `_pull`, this room ties the engine and the store together. A path in an archive is only a key
to the archive's own members: it is never opened as a file.
"""
