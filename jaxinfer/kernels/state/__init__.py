"""Recurrent layers: delta rules, short convolutions and the slots of their states."""
