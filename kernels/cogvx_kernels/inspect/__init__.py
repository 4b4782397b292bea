"""What compiled kernels take and cost, read from their machine code."""
