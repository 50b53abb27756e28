"""Registries: what is asked of them over HTTP, and what their answers are worth.

Nothing that arrives is used before its size and its digest are checked, nothing is read without
a bound, and credentials go to nobody but the registry they are for. This is the only room in
which httpx is known; what leaves it are values, and errors of our own tree.
"""
