"""`jaxinfer plan`: where the weights of a model lie, and what fits, before they are loaded."""
