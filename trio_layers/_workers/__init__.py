"""Builds trees outside of trio's thread, in processes or threads, while blobs arrive."""
