"""Model-independent helpers: argument checks, units, cache folders, garbage collection."""
