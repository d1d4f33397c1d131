"""Capacity simulation: traces, models of step times, and an engine without a device (`scripts/simulate.py`)."""
