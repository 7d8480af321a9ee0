"""Copies of a model: one to keep, whatever becomes of the original, and one to try things on."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy with weights of its own, which need no gradients.

    Tensors that autograd made, such as the weight of a pruned or weight-normalised module, are copied as numbers: the
    module computes them again.
    """
    made = {id(tensor): tensor.detach().clone() for tensor in _attributes(model) if not tensor.is_leaf}
    copied = copy.deepcopy(model, made)
    for tensor in (*copied.parameters(), *copied.buffers()):
        tensor.requires_grad_(False)
        if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
            tensor.data = tensor.contiguous()  # kernels pack the weights in any case
    return copied


def trial_copy(model: nn.Module, *, buffers: bool = True) -> nn.Module:
    """A copy that shares the parameters, and the buffers if told so: a call may leave things in its attributes."""
    shared = (*model.parameters(), *(model.buffers() if buffers else ()))
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def _attributes(model: nn.Module) -> Iterable[Tensor]:
    """Tensors that are neither parameters nor buffers."""
    for module in model.modules():
        others = [value for name, value in vars(module).items() if name not in ("_parameters", "_buffers", "_modules")]
        yield from (leaf for leaf in pytree.tree_leaves(others) if isinstance(leaf, Tensor))
