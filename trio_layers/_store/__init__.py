"""The store on disk: durable, visible, shared blobs, trees, layers and images.

This room imports neither the registry client nor the engine, and gets its unpacker as an argument.
"""
