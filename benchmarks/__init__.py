"""Measurements, to be read and not to be asserted.

``python -m benchmarks`` compares pulls, ``benchmarks.stages`` says where the time of one goes,
``benchmarks.engine`` measures the engine alone.
"""
