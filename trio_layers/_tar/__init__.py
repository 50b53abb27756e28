"""Reads members from a layer's compressed tar, and writes headers. Opens no files."""
