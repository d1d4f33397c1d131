"""What the Triton kernels share: launches, tiles and work lists."""
