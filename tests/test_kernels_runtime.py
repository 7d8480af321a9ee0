"""Buffers, the cache of kernels, threads and forks, and the description of machines."""

from __future__ import annotations

import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_checks import depthwise_case, depthwise_forward, pointwise_forward

from sepconv.kernels.case import pool as pool_case
from sepconv.kernels.halide.conv import depthwise
from sepconv.kernels.halide.conv import pool as pool_kernel
from sepconv.kernels.halide.jit import code_cache, runtime
from sepconv.kernels.halide.jit import threads as pool
from sepconv.kernels.halide.jit.buffers import buffer
from sepconv.kernels.halide.jit.calls import KernelCall, Strided
from sepconv.kernels.halide.jit.machine_code import Chain, in_chains
from sepconv.kernels.halide.schedule import machine, peak

pytestmark = pytest.mark.skipif(bool(runtime.missing()), reason=runtime.missing())

_WALK = (1, 1), ((1, 1), (1, 1)), (1, 1)


def _doubling() -> tuple[Any, list[Any]]:
    import halide as hl

    x, y = hl.vars("x y")
    source, out = hl.ImageParam(hl.Float(32), 2, "source"), hl.Func("doubling")
    source.dim(0).set_stride(hl.Expr())
    out[x, y] = source[x, y] * 2
    out.output_buffer().dim(0).set_stride(hl.Expr())
    return out, [source]


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t,
        lambda t: t.t(),
        lambda t: t[1:, ::3],
        lambda t: t[:1].expand(5, -1),
        lambda t: t.requires_grad_(),
        lambda t: t[2:3, 4:5],
    ],
    ids=["whole", "transposed", "strided", "expanded", "leaf", "one_element"],
)
def test_buffers_are_views(view: Any) -> None:
    tensor = view(torch.randn(7, 11))
    out = torch.full(tensor.shape, float("nan"))
    kernel = runtime.compiled("doubling", _doubling)
    kernel(buffer(tensor), buffer(out))
    torch.testing.assert_close(out, tensor.detach() * 2, rtol=0, atol=0)


def test_buffer_splits_and_adds_dimensions() -> None:
    split = buffer(torch.empty(2, 6, 5, 7), (2, 3, 2, 1, 5, 7))
    assert split.shape == (2, 3, 2, 1, 5, 7)
    assert list(split.strides) == [210, 70, 35, 35, 7, 1]


SQUARE = torch.empty(3, 3)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ((SQUARE, torch.empty(3, 4)), "access out of bounds of source: 0 to 4 of 3 in dimension 0"),
        ((SQUARE, torch.empty(9)), r"bad dimensions of doubling(\$\d+)?: 2, got 1"),
        ((SQUARE.int().numpy(), SQUARE), "bad type of source"),
        ((1, SQUARE), "bad kind of source, got int"),
        ((SQUARE,), "it takes 2, got 1"),
        ((SQUARE, SQUARE, SQUARE), "it takes 2, got 3"),
    ],
)
def test_a_wrong_argument_raises_instead_of_crashing(given: tuple[Any, ...], reason: str) -> None:
    kernel = runtime.compiled("doubling", _doubling)
    arguments = [item if isinstance(item, int) else buffer(item) for item in given]
    for call in (kernel, kernel.bind):
        with pytest.raises(RuntimeError, match=f"a kernel refused its arguments: {reason}"):
            call(*arguments)


def _shifted() -> tuple[Any, list[Any]]:
    import halide as hl

    x, by = hl.Var("x"), hl.Param(hl.Int(32), "by")
    source, out = hl.ImageParam(hl.Float(32), 1, "source"), hl.Func("shifted")
    out[x] = source[x + by]
    return out, [source, by]


def test_what_is_read_depends_on_numbers_too() -> None:
    kernel = runtime.compiled("shifted", _shifted)
    source, out = torch.arange(7.0), torch.full((4,), float("nan"))
    kernel(buffer(source), 3, buffer(out))
    assert out.tolist() == [3, 4, 5, 6]
    for by, place in ((4, "4 to 8 of 7"), (-1, "-1 to 3 of 7")):
        with pytest.raises(RuntimeError, match=f"access out of bounds of source: {place} in dimension 0"):
            kernel(buffer(source), by, buffer(out))
    assert out.tolist() == [3, 4, 5, 6]


def test_a_prepared_call_is_checked_before_it_is_made() -> None:
    with pytest.raises(RuntimeError, match="access out of bounds of source: 0 to 4 of 3 in dimension 0"):
        KernelCall("doubling", _doubling, [Strided((3,) * 2, (3, 1)), Strided((3, 4), (4, 1))])


def test_a_kernel_is_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(code_cache.VARIABLE, "")
    built = []

    def build() -> tuple[Any, list[Any]]:
        built.append(1)
        return _doubling()

    runtime.clear_cache()
    starters = [threading.Thread(target=runtime.compiled, args=("once", build)) for _ in range(8)]
    for starter in starters:
        starter.start()
    for starter in starters:
        starter.join()
    assert built == [1]
    assert runtime.cached_kernels() == 1


def test_neighbouring_kernels_are_joined_in_order() -> None:
    tensors = [torch.full((3, 5), float(i)) for i in range(1, 6)]
    kernel = runtime.compiled("doubling", _doubling)
    calls: list[Any] = [kernel.bind(buffer(a), buffer(b)) for a, b in pairwise(tensors)]
    seen = []
    joined = in_chains([Chain(calls[:2]), calls[2], lambda: seen.append(tensors[3].clone()), calls[3]])
    del calls
    assert [type(run) for run in joined[::2]] == [Chain, Chain]
    assert [len(run.bound) for run in joined[::2]] == [3, 1]
    for start in (1.0, 3.0):
        tensors[0].fill_(start)
        for run in joined:
            run()
        assert [float(tensor[2, 4]) for tensor in tensors] == [start * 2**i for i in range(5)]
        assert (seen.pop() == start * 8).all()


def test_a_failed_build_is_a_reason_and_is_remembered() -> None:
    attempts = []

    def broken() -> tuple[Any, list[Any]]:
        import halide as hl

        attempts.append(1)
        func, arguments = _doubling()
        func.vectorize(hl.Var("no_such_loop"))
        return func, arguments

    for _ in range(2):
        with pytest.raises(runtime.BuildError, match="cannot build broken"):
            runtime.compiled("broken", broken)
    assert attempts == [1]


def test_the_cache_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime.clear_cache()
    monkeypatch.setattr(runtime, "MAX_KERNELS", 3)
    for number in range(5):
        runtime.compiled(number, _doubling)
        runtime.compiled(0, _doubling)
    assert runtime.cached_kernels() == 3
    kept = {key for key, _ in runtime._cache}
    assert 0 in kept
    assert 2 not in kept


def test_unsuitable_names_what_is_wrong() -> None:
    assert runtime.unsuitable(torch.empty(2), torch.empty(3)[::2]) == ""
    assert "float64" in runtime.unsuitable(torch.empty(2).double())
    assert "meta" in runtime.unsuitable(torch.empty(2, device="meta"))
    assert "strided" in runtime.unsuitable(torch.eye(2).to_sparse())
    assert "32 bits" in runtime.unsuitable(torch.empty(1).expand(2**31))
    assert "32 bits" in runtime.unsuitable(torch.empty(2, device="cpu").as_strided((1, 2), (1, 1)).expand(2**30, 2))
    assert runtime.unsuitable(torch.empty(1).expand(2**31 - 1)) == ""


def test_without_halide_everything_imports_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "hl", None)
    monkeypatch.setattr(runtime, "_IMPORT_ERROR", "no module", raising=False)
    assert "pip install halide" in runtime.missing()
    x = torch.randn(1, 4, 5, 5)
    assert "halide" in depthwise.supports(depthwise_case("forward", x, torch.randn(4, 1, 3, 3), *_WALK))


def _many_calls(results: list[bool]) -> None:
    generator = torch.Generator().manual_seed(len(results))
    for channels, side in [(16, 9), (32, 13), (16, 9), (48, 7)] * 5:
        x = torch.randn(2, channels, side, side, generator=generator).contiguous(memory_format=torch.channels_last)
        weight = torch.randn(channels, 1, 3, 3, generator=generator)
        y = depthwise_forward(x, weight, None, *_WALK)
        truth = torch.conv2d(x, weight, None, 1, 1, 1, channels)
        results.append(bool((y - truth).abs().max() < 1e-4))


@pytest.mark.usefixtures("threads")
def test_eight_python_threads_at_once() -> None:
    results: list[list[bool]] = [[] for _ in range(8)]
    workers = [threading.Thread(target=_many_calls, args=(result,)) for result in results]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [len(result) for result in results] == [20] * 8
    assert all(all(result) for result in results)


def test_the_thread_count_follows_torch() -> None:
    before = torch.get_num_threads()
    try:
        for count in (2, 1, 3):
            torch.set_num_threads(count)
            runtime.compiled("doubling", _doubling)
            assert pool._threads.value == count
    finally:
        torch.set_num_threads(before)


def test_host_is_described() -> None:
    host = machine.host()
    assert host.lanes in (4, 8, 16)
    assert host.registers in (16, 32)
    assert 8 * 1024 <= host.l1_bytes <= host.l2_bytes


def test_named_machines() -> None:
    assert (machine.named("avx2").lanes, machine.named("avx2").registers) == (8, 16)
    assert (machine.named("avx512").lanes, machine.named("avx512").registers) == (16, 32)
    assert (machine.named("neon").lanes, machine.named("neon").registers) == (4, 32)
    with pytest.raises(ValueError, match="name must be one of"):
        machine.named("z80")


def test_cache_sizes_come_from_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for index, (kind, level, size) in enumerate([("Instruction", 1, "64K"), ("Data", 1, "48K"), ("Unified", 2, "2M")]):
        directory = tmp_path / f"index{index}"
        directory.mkdir()
        for name, value in (("type", kind), ("level", level), ("size", size)):
            (directory / name).write_text(f"{value}\n")
    (tmp_path / "index9").mkdir()
    monkeypatch.setattr(machine, "_CACHE_DIRECTORY", tmp_path)
    assert machine.cache_bytes(1, 5) == 48 * 1024
    assert machine.cache_bytes(2, 5) == 2 * 1024 * 1024
    assert machine.cache_bytes(3, 5) == 5


def test_one_thread_is_one_thread_after_more_were_used() -> None:
    """A kernel for one thread shares nothing out."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        peak.fma_peak_gflops(2, repeats=2)
        torch.set_num_threads(1)
        x, weight = torch.randn(8, 64, 56, 56), torch.randn(64, 64, 1, 1)
        pointwise_forward(x, weight, None)
        others = []
        for _ in range(7):
            mine, everyone = time.thread_time(), time.process_time()
            for _ in range(5):
                pointwise_forward(x, weight, None)
            mine = time.thread_time() - mine
            others.append((time.process_time() - everyone - mine) / mine)
        assert min(others) < 0.1
    finally:
        torch.set_num_threads(before)


def test_the_step_of_a_single_channel_says_nothing() -> None:
    x, out = torch.randn(2, 1, 5, 7), torch.full((2, 1), float("nan"))
    pool_kernel.bind(pool_kernel.plan(pool_case(x, out)), x, [], None, out)()
    torch.testing.assert_close(out, x.mean((2, 3)))
