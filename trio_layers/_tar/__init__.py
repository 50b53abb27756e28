"""Reads the members of a layer's tar from its compressed bytes. Touches no file."""
