"""Parts shared by the Triton kernels: launches, tiles and work items."""
