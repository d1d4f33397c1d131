"""Kernels of recurrent layers: delta rules, short convolutions and state slots."""
