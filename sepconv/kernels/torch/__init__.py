"""PyTorch's own kernels: they run everywhere, and where ours do not win."""
