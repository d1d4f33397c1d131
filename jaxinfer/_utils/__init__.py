"""Helpers without a model: checks of values, units, cache folders, the garbage collector."""
