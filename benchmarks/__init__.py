"""Measurements, to be read and not to be asserted: ``benchmarks.engine``, ``benchmarks.pull``."""
