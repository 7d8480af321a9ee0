"""Every kernel reads and writes some of the channels of a larger image, and leaves the others alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sepconv.kernels import backends
from sepconv.kernels import case as cases
from sepconv.kernels.case import Case, Geometry, Window
from sepconv.kernels.halide.jit import runtime

pytestmark = pytest.mark.skipif(bool(runtime.missing()), reason=runtime.missing())

PADDED = Geometry((1, 1), ((1, 1), (1, 1)), (1, 1))


def channels(images: int, count: int, fill: float | None = None) -> Tensor:
    """So many channels of a larger image, from an odd place on."""
    whole = torch.randn(images, count + 12, 7, 9) if fill is None else torch.full((images, count + 12, 7, 9), fill)
    return whole.contiguous(memory_format=torch.channels_last)[:, 5 : 5 + count]


def described(kind: str, x: Tensor, residual: Tensor) -> tuple[Case, list[Tensor | None], Tensor | None]:
    """A case, its weights, and what is added; 21 channels of result."""
    bias, wide = torch.randn(21), x.shape[1]
    if kind == "depthwise":
        weight = torch.randn(21, 1, 3, 3)
        return cases.depthwise(x, weight, bias, PADDED, "relu"), [weight, bias], None
    if kind == "pointwise":
        weight = torch.randn(21, wide, 1, 1)
        return cases.pointwise(x, weight, bias, residual), [weight, bias], residual
    if kind in ("normal", "stem", "grouped"):
        weight = torch.randn(24 if kind == "grouped" else 21, wide // (6 if kind == "grouped" else 1), 3, 3)
        added = residual if kind == "normal" else None
        return cases.normal(x, weight, None, added, PADDED), [weight, None], added
    if kind == "separable":
        weight, mixed, first = torch.randn(wide, 1, 3, 3), torch.randn(21, wide, 1, 1), torch.randn(wide)
        depthwise = cases.depthwise(x, weight, first, PADDED, "relu6")
        case = cases.separable(depthwise, cases.pointwise(depthwise.y, mixed, bias, residual))
        return case, [weight, mixed, first, bias], residual
    if kind == "shuffle":
        return cases.shuffle(x, None, x, 3), [], None
    return cases.window(x, x, PADDED, Window((3, 3), mean=kind == "avg_pool")), [], None


WIDE = {"depthwise": 21, "pointwise": 19, "normal": 19, "stem": 3, "grouped": 24, "separable": 19}


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("kind", [*WIDE, "max_pool", "avg_pool", "shuffle"])
def test_kernels_take_channels_of_a_larger_image(kind: str, images: int) -> None:
    x, residual = channels(images, WIDE.get(kind, 21)), channels(images, 21)
    case, weights, added = described(kind, x, residual)
    out = channels(images, case.result.shape[1], torch.nan)
    backend = backends.choose(case.into(out)).backend
    assert backend.name == "halide"
    assert backend.binder is not None
    plan = backend.binder.plan(case.into(out))
    backend.binder.bind(plan, x, backend.binder.pack(plan, weights), added, out)()

    arguments = [x] if not weights else [x, *weights] + ([added] if kind != "depthwise" else [])
    expected = backends.BACKENDS[case.op][-1].prepare(case)(*arguments)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    whole = out._base
    assert whole is not None
    beside = torch.cat([whole[:, :5], whole[:, 5 + out.shape[1] :]], 1)
    assert bool(beside.isnan().all())
