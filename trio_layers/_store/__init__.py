"""Where layers and blobs are kept: in a directory, or in memory.

This room knows neither registry nor engine. What unpacks a layer is handed to it.
"""
