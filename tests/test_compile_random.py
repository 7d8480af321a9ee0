"""Random networks: whatever stands between the convolutions, a plan is made and computes what the model computes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from random_networks import RandomNetwork
from torch import Tensor
from torch.utils import _pytree as pytree

from sepconv.compile import CompiledModel, compile


def tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def check(seed: int, sizes: int = 1) -> None:
    """No exception, no warning, no whole model or group lost to a defect, no value off by more than rounding."""
    network = RandomNetwork(seed)
    fast = compile(network, network.example)
    compare(network, fast, network.example)
    for more in range(1, sizes):  # planned when first seen
        compare(network, fast, torch.randn(len(network.example) + more, *network.example.shape[1:]))


def compare(network: RandomNetwork, fast: CompiledModel, x: Tensor) -> None:
    with torch.no_grad():
        eager, exact = tensors(network(x.clone())), tensors(copy.deepcopy(network).double()(x.double()))
        results, again = tensors(fast(x)), tensors(fast(x))
    explained = fast.explain()
    assert explained.reason == "", str(network)
    assert [group.reason for group in explained.groups if "Error" in group.reason] == [], str(network)
    for ours, theirs, truth, second in zip(results, eager, exact, again, strict=True):
        assert ours.dtype is theirs.dtype
        # What the same operations lose in float32, in another order, and an epsilon for where they lose nothing.
        limit = 10 * (theirs - truth).abs().max() + 1e-5 * truth.abs().max()
        assert (ours - truth).abs().max() <= limit, str(network)
        assert torch.equal(ours, second), str(network)


@pytest.mark.parametrize("seed", [pytest.param(n, marks=[pytest.mark.slow] * (n >= 12)) for n in range(40)])
def test_compile_random_networks(seed: int) -> None:
    check(seed, sizes=2 if seed % 4 == 0 else 1)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1000, 1500, 50))
def test_compile_many_random_networks(first: int) -> None:
    for seed in range(first, first + 50):
        check(seed, sizes=3)
