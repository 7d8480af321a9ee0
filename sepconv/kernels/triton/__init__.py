"""Depthwise convolutions on GPUs, in Triton: each kernel is compared with PyTorch's and timed on the card before it is
used. The package ``triton`` is imported when the first tensor on a GPU arrives, and not before."""
