"""Measurements of pulls, for reading, not for assertions.

``python -m benchmarks`` compares pulls, ``benchmarks.stages`` shows the time of each stage of a
pull, ``benchmarks.engine`` measures the engine alone.
"""
