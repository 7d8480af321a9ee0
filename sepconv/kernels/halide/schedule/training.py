"""Sizes of the blocks in which images go through stages in training."""

from __future__ import annotations

import torch

from sepconv.kernels.halide.schedule import machine

# What a block takes of the second cache, beside what the product itself brings there. Measured on Granite Rapids: with
# a third of it a pointwise layer of 128 channels at 24 x 24 takes 0.8 of the time of the whole image at once.
_SHARE = 3
# PyTorch's product of bfloat16 brings weights into its own order in every call: dearer than the way to memory.
_WHOLE = 64 << 20


def forward_block(dtype: torch.dtype, threads: int) -> int:
    """Bytes of a block of what the product reads and writes."""
    return _WHOLE if dtype is torch.bfloat16 else machine.host().l2_bytes // _SHARE * threads


def gradient_block(dtype: torch.dtype, threads: int) -> int:
    """The same of gradients: of what is between the passes."""
    return forward_block(dtype, threads)
