"""Loading: from a folder or Hub id to a module on devices, and the plan of a model before it is loaded."""
