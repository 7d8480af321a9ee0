"""Copies of a model: one to keep, whatever becomes of the original, and one to try things on."""

from __future__ import annotations

import copy

import torch
from torch import nn

from sepconv.compile.mapped import map_weights
from sepconv.layers.borrowed import copied


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy with weights of its own, which need no gradients.

    Raises:
        ValueError: the model cannot be copied.
    """
    frozen: nn.Module = copied(model, "compile")
    for tensor in (*frozen.parameters(), *frozen.buffers()):
        tensor.requires_grad_(False)
        if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
            tensor.data = tensor.contiguous()  # kernels pack the weights in any case
    map_weights(frozen)
    return frozen


def trial_copy(model: nn.Module, *, buffers: bool = True) -> nn.Module:
    """A copy that shares the parameters, and the buffers if told so: a call may leave things in its attributes."""
    shared = (*model.parameters(), *(model.buffers() if buffers else ()))
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
