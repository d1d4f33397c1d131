"""Matrix products of dense, int8 and grouped (mixture of experts) weights."""
