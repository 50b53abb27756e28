"""Reads a stack of trees as one root file system: merged view, mounts, export, tar."""
