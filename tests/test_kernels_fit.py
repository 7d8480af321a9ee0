"""What a kernel's code takes for granted of its arguments is asked once, when they are bound."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sepconv.kernels.halide.jit import code_cache, fit, runtime
from sepconv.kernels.halide.jit.buffers import Buffer, buffer
from sepconv.kernels.halide.jit.calls import KernelCall, Strided

pytestmark = pytest.mark.skipif(bool(runtime.missing()), reason=runtime.missing())


def _fixed() -> tuple[Any, list[Any]]:
    """Rows of 6 numbers side by side, 10 apart in the source and 8 in the result; ``n`` is whole and ``f`` is not."""
    import halide as hl

    x, y, n, f = hl.Var("x"), hl.Var("y"), hl.Param(hl.Int(32), "n"), hl.Param(hl.Float(32), "f")
    source, out = hl.ImageParam(hl.Float(32), 2, "source"), hl.Func("fixed")
    out[x, y] = source[x, y] * f + n
    source.dim(0).set_min(0).set_extent(6)
    source.dim(1).set_stride(10)
    out.output_buffer().dim(1).set_stride(8)
    return out, [source, n, f]


def _source(rows: int = 4, columns: int = 6, step: int = 10) -> Tensor:
    return torch.randn(rows * step)[: rows * step].view(rows, step)[:, :columns]


def _out(rows: int = 4, columns: int = 6, step: int = 8) -> Tensor:
    return torch.full((rows, step), float("nan"))[:, :columns]


def test_what_fits_is_computed() -> None:
    source, out = _source(), _out()
    runtime.compiled("fixed", _fixed)(buffer(source), 3, 0.5, buffer(out))
    torch.testing.assert_close(out, source * 0.5 + 3)
    assert out._base is not None
    assert out._base[:, 6:].isnan().all()


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ((_source(step=11), 3, 0.5, _out()), "bad stride of source: 10, got 11 in dimension 1"),
        ((_source().t().contiguous().t(), 3, 0.5, _out()), "bad stride of source: 1, got 4 in dimension 0"),
        ((_source(), 3, 0.5, _out(step=9)), r"bad stride of fixed(\$\d+)?: 8, got 9 in dimension 1"),
        ((_source(), 3, 0.5, torch.empty(8, 4).t()), r"bad stride of fixed(\$\d+)?: 1, got 4 in dimension 0"),
        ((_source(columns=8), 3, 0.5, _out()), "bad extent of source: 6, got 8 in dimension 0"),
        ((_source(columns=5), 3, 0.5, _out(columns=5)), "bad extent of source: 6, got 5 in dimension 0"),
        ((_source(rows=3), 3, 0.5, _out()), "access out of bounds of source: 0 to 4 of 3 in dimension 1"),
        ((_source(), 3.0, 0.5, _out()), "bad number for n, got 3.0"),
        ((_source(), 3, 1, _out()), "bad number for f, got 1"),
        ((_source(), 2**31, 0.5, _out()), "bad number for n, got 2147483648"),
    ],
)
def test_what_does_not_fit_is_refused(given: tuple[Any, ...], reason: str) -> None:
    kernel = runtime.compiled("fixed", _fixed)
    arguments = [buffer(item) if isinstance(item, Tensor) else item for item in given]
    with pytest.raises(RuntimeError, match=f"a kernel refused its arguments: {reason}"):
        kernel.bind(*arguments)


def test_a_prepared_call_is_asked_too() -> None:
    with pytest.raises(RuntimeError, match="bad stride of source: 10, got 7 in dimension 1"):
        KernelCall("fixed", _fixed, [Strided((4, 6), (7, 1)), 3, 0.5, Strided((4, 6), (8, 1))])


def test_the_step_of_a_single_element_says_nothing() -> None:
    source, out = _source(rows=1), _out(rows=1)
    given = [Buffer((1, 6), (777, 1), tensor.data_ptr()) for tensor in (source, out)]
    runtime.compiled("fixed", _fixed)(given[0], 3, 0.5, given[1])
    torch.testing.assert_close(out, source * 0.5 + 3)


def test_what_was_fixed_is_kept_with_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(code_cache.VARIABLE, str(tmp_path))
    runtime.clear_cache()
    runtime.compiled("fixed", _fixed)
    runtime.clear_cache()

    def unbuilt() -> Any:
        raise AssertionError("it is on disk")

    kernel = runtime.compiled("fixed", unbuilt)
    with pytest.raises(RuntimeError, match="bad stride of source: 10, got 11 in dimension 1"):
        kernel.bind(buffer(_source(step=11)), 3, 0.5, buffer(_out()))


def _changed(change: Callable[[Any, Any], object]) -> tuple[Any, list[Any]]:
    func, arguments = _fixed()
    change(arguments[0], arguments[1])
    return func, arguments


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda source, n: source.dim(1).set_stride(n), "only numbers can be taken for granted"),
        (lambda source, n: source.dim(1).set_min(2), "source must start at 0 and may lie anywhere in memory"),
        (lambda source, n: source.set_host_alignment(64), "source must start at 0 and may lie anywhere in memory"),
    ],
    ids=["stride", "start", "alignment"],
)
def test_a_kernel_must_not_take_for_granted_what_is_not_asked(change: Any, reason: str) -> None:
    with pytest.raises(runtime.BuildError, match=reason):
        runtime.compiled(f"fixed, {reason}, {change}", lambda: _changed(change))


def test_limits_are_read_from_the_pipeline() -> None:
    import halide as hl

    func, arguments = _fixed()
    found = fit.limits(hl.Pipeline(func), arguments)
    assert found == [[[6, 1], [None, 10]], [[None, 1], [None, 8]]]
    assert fit.read(fit.written(found)) == found
