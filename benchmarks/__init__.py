"""Measurements, to be read and not to be asserted. `python -m benchmarks --help` lists them."""
