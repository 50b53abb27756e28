"""The engine: keyed transfers, shared between pulls, and the order of layers.

It uses protocols (`trio_layers.abc`) and values, and neither HTTP nor disks. It wraps the stream of
a layer source for progress and cancellation, and never interprets its bytes.
"""
