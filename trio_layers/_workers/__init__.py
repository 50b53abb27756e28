"""Builds trees outside trio's thread, in processes or threads, while blobs arrive."""
