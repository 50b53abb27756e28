"""Unpacking: from a layer's bytes to a tree on disk.

It runs in a worker thread, knows neither trio nor HTTP, and is told where the bytes come from,
where the tree goes and what is below it. Nothing outside that tree is opened, made or changed.
"""
