"""The engine: keyed transfers, shared between pulls, and the order of layers.

It knows protocols (`trio_layers.abc`) and values, neither HTTP nor disk: it wraps what a layer
source hands out (progress, cancellation) and never interprets it.
"""
