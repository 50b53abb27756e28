"""Unpacks one layer: writes its tar members to a directory, and lists its entries."""
