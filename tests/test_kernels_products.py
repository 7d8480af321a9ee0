"""PyTorch's product of matrices called like a kernel, and chains that walk through memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sepconv.kernels.halide.jit import products, runtime, threads
from sepconv.kernels.halide.jit.buffers import buffer
from sepconv.kernels.halide.jit.machine_code import Repeated
from sepconv.kernels.halide.jit.products import GemmCall

pytestmark = pytest.mark.skipif(bool(runtime.missing() or products.missing()), reason="no product to call")


def _operands(turned: tuple[bool, bool]) -> tuple[Tensor, Tensor]:
    """7 x 11 and 11 x 5 numbers, in rows that are longer."""
    sizes = [size[::-1] if turn else size for size, turn in zip(((7, 11), (11, 5)), turned, strict=True)]
    left, right = [torch.randn(rows, columns + 3)[:, :columns] for rows, columns in sizes]
    return left, right


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("turned", [(False, False), (False, True), (True, False), (True, True)])
def test_a_product(turned: tuple[bool, bool], add: bool) -> None:
    left, right = _operands(turned)
    whole = torch.full((7, 9), torch.nan)
    out = whole[:, 2:7]
    if add:
        out.copy_(torch.randn(7, 5))
    factors = [t.t().double() if turn else t.double() for t, turn in zip((left, right), turned, strict=True)]
    exact = factors[0] @ factors[1] + (out.double() if add else 0.0)
    product = GemmCall((7, 5, 11), (left.stride(0), right.stride(0), 9), turned, add)
    threads.follow_torch()
    product.bind(buffer(left), buffer(right), buffer(out))()
    assert float((out.double() - exact).abs().max()) < 1e-5
    assert bool(whole[:, :2].isnan().all())
    assert bool(whole[:, 7:].isnan().all())


def test_a_chain_walks_through_memory() -> None:
    left, right, out = torch.randn(12, 4), torch.randn(4, 3), torch.full((13, 3), torch.nan)
    given = buffer(left[:4]), buffer(right), buffer(out[:4])
    product = GemmCall((4, 3, 4), (4, 3, 3), (False, False))
    walk = Repeated([product.bind(*given)], 3, [(given[0], 4 * 4 * 4), (given[2], 4 * 3 * 4)])
    walk()
    torch.testing.assert_close(out[:12], left @ right)
    assert bool(out[12].isnan().all())
    assert given[0].host == left.data_ptr() + left.numel() * 4


def test_a_library_without_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_address", lambda: None)
    assert products.missing() == "PyTorch's library of linear algebra offers no sgemm_ here"
