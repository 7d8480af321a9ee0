"""A case describes a call: it can be compared, kept and asked, and holds no memory."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from cases import CASES
from cases import Case as Convolution
from torch.nn import functional as F

from sepconv.kernels import case, layout
from sepconv.kernels.case import Case, Geometry, Outline

_WALK = Geometry((1, 1), ((1, 1), (1, 1)), (1, 1))


def _separable(x: torch.Tensor) -> Case:
    first = case.depthwise(x, torch.randn(16, 1, 3, 3), None, _WALK, "relu")
    return case.separable(first, case.pointwise(first.y, torch.randn(5, 16, 1, 1), torch.randn(5)))


def test_equal_calls_are_equal_cases() -> None:
    x = torch.randn(2, 8, 5, 7)
    one, other = _separable(x), _separable(torch.zeros(2, 8, 5, 7))
    assert one == other
    assert len({one, other, pickle.loads(pickle.dumps(one)), copy.deepcopy(other)}) == 1
    different = [
        _separable(x.contiguous(memory_format=torch.channels_last)),
        _separable(x.bfloat16()),
        _separable(x.to("meta")),
        replace(one, threads=one.threads + 1),
        replace(one, which="grad_input"),
        replace(one, geometry=_WALK._replace(padding=((1, 1), (0, 2)))),
        one.into(torch.empty(2, 5, 5, 7)),
        one.first,
    ]
    assert len({one, *different}) == 1 + len(different)


def test_a_case_cannot_be_changed() -> None:
    found = _separable(torch.randn(2, 8, 5, 7))
    with pytest.raises(FrozenInstanceError):
        found.which = "grad_input"  # type: ignore[misc]
    with pytest.raises(AttributeError):
        found.x.shape = (1,)  # type: ignore[misc]


def test_a_case_keeps_no_tensor() -> None:
    x = torch.randn(2, 8, 5, 7)
    gone, found = weakref.ref(x), _separable(x)
    del x
    gc.collect()
    assert gone() is None
    assert found.x.elements == 2 * 8 * 5 * 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_an_outline_makes_a_tensor_without_memory(dtype: torch.dtype) -> None:
    wide = torch.zeros(2, 9, 4, 6, dtype=dtype).contiguous(memory_format=torch.channels_last)
    for tensor in (wide, wide[:, 2:5], wide.contiguous(), wide[0], wide[:, :, ::2, 1]):
        outline = Outline.of(tensor)
        made = outline.meta()
        assert (made.shape, made.stride(), made.dtype) == (tensor.shape, tensor.stride(), dtype)
        assert made.is_meta
        assert outline == Outline.of(made).on(torch.device("cpu"))
        assert outline.channels_last == layout.is_channels_last(tensor)
        assert outline.contiguous == tensor.is_contiguous()
        assert outline.to(torch.float32) == Outline.of(tensor.to(torch.float32))


def test_an_outline_knows_what_is_not_plain() -> None:
    assert not Outline.of(torch.eye(3).to_sparse()).plain
    assert not Outline.of(torch.randn(3, dtype=torch.complex64).conj().imag).plain
    assert Outline.of(torch.randn(3, 4).t()).plain


@pytest.mark.parametrize("convolution", CASES, ids=lambda convolution: convolution.name)
def test_the_result_is_as_large_as_pytorchs(convolution: Convolution) -> None:
    c, g = convolution, convolution.geometry
    x = torch.empty(c.batch, c.channels, *c.image, device="meta")
    weight = torch.empty(c.channels * c.multiplier, 1, *c.kernel, device="meta")
    found = case.depthwise(x, weight, None, g)
    conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[c.dims]
    padded = F.pad(x, [amount for pair in reversed(g.padding) for amount in pair])
    assert found.result.shape == tuple(conv(padded, weight, None, g.stride, 0, g.dilation, c.channels).shape)
    assert found.result.device.type == "meta"
    assert case.depthwise_grad_input(found.y, weight, x.shape, g).result == found.x
    assert case.depthwise_grad_weight(found.y, x, weight.shape, g).result == found.weight


def test_a_separable_case_is_its_two_parts() -> None:
    found = _separable(torch.randn(2, 8, 5, 7))
    assert found.then is not None
    assert (found.first.op, found.then.op, found.first.result) == ("depthwise", "pointwise", found.then.x)
    assert found.result.shape == (2, 5, 5, 7)
    assert [outline.shape[0] for outline in found.given] == [2, 16, 5, 5]


def test_given_memory_says_how_the_result_lies() -> None:
    out = torch.empty(2, 5, 5, 7).contiguous(memory_format=torch.channels_last)
    bound = _separable(torch.randn(2, 8, 5, 7)).into(out)
    assert bound.bound
    assert bound.first.bound
    assert bound.result == Outline.of(out)
    assert bound.then is not None
    assert bound.first.result == bound.then.x
    assert bound.then.x.channels_last
