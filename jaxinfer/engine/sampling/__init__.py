"""The sampler and the per-row arrays that it reads."""
