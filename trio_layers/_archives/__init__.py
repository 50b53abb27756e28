"""Image archives and layouts, in and out of the store: a tie like `_pull`, which it stands beside.

What an archive says is only ever a key into what it holds: no path of it is opened.
"""
