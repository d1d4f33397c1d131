"""Neural-network modules that models are built from."""
