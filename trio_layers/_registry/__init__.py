"""The registry client: the distribution protocol over HTTP.

Nothing received is used before its size and its digest are checked, nothing is read without a
bound, and credentials go only to the registry that they are for. Only this room uses httpx. Its
results are values, and errors of our own tree.
"""
