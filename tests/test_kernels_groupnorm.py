"""Groups of channels of one mean and deviation: right for every size, and nothing written beside."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import image, poisoned
from torch import nn
from torch.nn import functional as F

from sepconv.compile import compile
from sepconv.kernels import backends, case
from sepconv.kernels.case import GroupNormDetail, Outline
from sepconv.kernels.halide.conv import groupnorm
from sepconv.kernels.halide.jit import runtime

pytestmark = pytest.mark.skipif(bool(runtime.missing()), reason=runtime.missing())
EPS = torch.finfo(torch.float32).eps

SIZES = {
    "one_group": ((2, 37, 5, 7), 1),
    "a_group_per_channel": ((2, 17, 11, 3), 17),
    "groups": ((1, 24, 13, 7), 4),
    "channels_below_vector": ((2, 6, 5, 7), 3),
    "one_pixel": ((2, 16, 1, 1), 2),
}


@pytest.mark.parametrize("name", SIZES)
def test_groups(name: str) -> None:
    torch.manual_seed(0)
    shape, groups = SIZES[name]
    # Means far from 0: sums of squares would lose what is left.
    x = image(shape, channels_last=True) + 30
    weight, bias = torch.rand(shape[1]), torch.randn(shape[1])
    out, check = poisoned(torch.empty(shape).contiguous(memory_format=torch.channels_last))
    known = case.group_norm(x, out, GroupNormDetail(groups, 1e-5)).into(out)
    assert backends.choose(known).backend.name == "halide"
    found = groupnorm.plan(known)
    groupnorm.bind(found, x, groupnorm.pack(found, (weight, bias)), None, out)()
    truth = F.group_norm(x.double(), groups, weight.double(), bias.double(), 1e-5)
    deviation = (x.double().reshape(shape[0], groups, -1).var(-1, unbiased=False).min() + 1e-5).sqrt()
    terms = shape[2] + shape[3] + shape[1] // groups + 8
    assert (out - truth).abs().max() <= terms * EPS * (1 + x.abs().max() / deviation)
    check()


def test_threads_share_rows(threads: int) -> None:
    x = torch.randn(3, 16, 7, 5).contiguous(memory_format=torch.channels_last)
    out, weight, bias = torch.full_like(x, torch.nan), torch.rand(16), torch.randn(16)
    known = case.group_norm(x, out, GroupNormDetail(4, 1e-5)).into(out)
    assert known.threads == threads
    found = groupnorm.plan(known)
    groupnorm.bind(found, x, groupnorm.pack(found, (weight, bias)), None, out)()
    torch.testing.assert_close(out, F.group_norm(x, 4, weight, bias))


def test_refusals() -> None:
    detail = GroupNormDetail(2, 1e-5)
    x = Outline.channels_last_of((1, 16, 5, 7))
    assert groupnorm.supports(case.group_norm(x, x, detail)) == ""
    assert "channels_last" in groupnorm.supports(case.group_norm(Outline.contiguous_of(x.shape), x, detail))
    assert "float32" in groupnorm.supports(case.group_norm(x.to(torch.float64), x, detail))
    signal, none = Outline.contiguous_of((1, 16, 5)), Outline.channels_last_of((0, 16, 5, 7))
    assert "1 spatial" in groupnorm.supports(case.group_norm(signal, signal, detail))
    assert "empty" in groupnorm.supports(case.group_norm(none, none, detail))
    assert groupnorm.describe(case.group_norm(x, x, detail))["channels_of_a_group"] == 8


def test_functions_leave_it_to_pytorch() -> None:
    x, weight, bias = torch.randn(1, 16, 5, 7), torch.rand(16), torch.randn(16)
    choice = backends.choose(case.group_norm(x, x, GroupNormDetail(4, 1e-5)))
    assert choice.backend.name == "torch"
    torch.testing.assert_close(choice(x, weight, bias), F.group_norm(x, 4, weight, bias))


@pytest.mark.parametrize("affine", [False, True])
def test_networks_have_groups_of_it(affine: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(5, 16, 1), nn.GroupNorm(4, 16, affine=affine), nn.ReLU()).eval()
    for norm in model:
        if affine and isinstance(norm, nn.GroupNorm):
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
    x = torch.randn(2, 5, 7, 11)
    fast = compile(model, x)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)
    found = [(group.kind, group.kernel) for group in fast.explain().groups if group.kind != "copy"]
    assert found == [("pointwise", "halide"), ("group_norm", "halide"), ("elementwise", "halide")]
    signals = nn.GroupNorm(2, 4).eval()
    x = torch.randn(2, 4, 9)
    torch.testing.assert_close(compile(signals, x)(x), signals(x))
