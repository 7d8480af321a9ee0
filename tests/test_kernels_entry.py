"""What fails inside a kernel comes out as an error, in every way in which kernels are called, and nothing leaks."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import sepconv
from sepconv.kernels.halide.jit import entry, llvm, machine_code, packing, runtime
from sepconv.kernels.halide.jit.buffers import buffer
from sepconv.kernels.halide.jit.calls import KernelCall, Strided
from sepconv.kernels.halide.jit.machine_code import Chain

resource = pytest.importorskip("resource", reason="this system has no limits of memory")
pytestmark = pytest.mark.skipif(bool(runtime.missing()), reason=runtime.missing())

# Memory for the first few requests only.
_SCARCE = """
@left = global i32 {left}

define ptr @scarce(ptr %context, i64 %bytes) {{
  %left = atomicrmw sub ptr @left, i32 1 monotonic
  %some = icmp sgt i32 %left, 0
  br i1 %some, label %give, label %refuse
refuse:
  call void inttoptr (i64 {leave} to ptr)(ptr %context, i32 -11)
  unreachable
give:
  %memory = call ptr inttoptr (i64 {halide_malloc} to ptr)(ptr %context, i64 %bytes)
  ret ptr %memory
}}
"""


@contextmanager
def scarce(left: int) -> Iterator[None]:
    """Kernels that are loaded meanwhile get memory so many times."""
    machine_code._define_runtime(b"")
    code = _SCARCE.format(left=left, **entry.functions()._asdict())
    llvm.define("halide_malloc", llvm.assemble(code, "scarce")[0])
    runtime.clear_cache()
    try:
        yield
    finally:
        machine_code._define_memory()
        runtime.clear_cache()


def _tiles() -> tuple[Any, list[Any]]:
    """Two tiles on the heap for each row, and one for all of them; the rows are shared out."""
    import halide as hl

    x, y, n = hl.Var("x"), hl.Var("y"), hl.Param(hl.Int(32), "n")
    source, whole, out = hl.ImageParam(hl.Float(32), 2, "source"), hl.Func("whole"), hl.Func("out")
    first, second = hl.Func("first"), hl.Func("second")
    whole[x, y] = source[x, y] * 2.0
    first[x, y] = whole[x, y] + whole[n - 1 - x, y]
    second[x, y] = first[x, y] + first[n - 1 - x, y]
    out[x, y] = second[x, y] + second[n - 1 - x, y]
    whole.compute_root().store_in(hl.MemoryType.Heap)
    for tile in (first, second):
        tile.compute_at(out, y).store_in(hl.MemoryType.Heap)
    runtime.parallel(out, y)
    return out, [source, n]


def _right(source: torch.Tensor, out: torch.Tensor) -> bool:
    return torch.equal(out, 8 * (source + source.flip(1)))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("left", [0, 1, 2, 3, 6])
def test_no_memory_is_an_error_and_what_was_given_goes_back(left: int) -> None:
    """In the kernel itself or in a task, on whichever thread: the thread that called gets the error."""
    source, out = torch.arange(40.0).reshape(5, 8), torch.empty(5, 8)
    with scarce(left), pytest.raises(MemoryError, match=r"^the tiles kernel got no memory for its tiles$"):
        runtime.compiled("tiles", _tiles)(buffer(source), 8, buffer(out))
    runtime.compiled("tiles", _tiles)(buffer(source), 8, buffer(out))
    assert _right(source, out)


@pytest.mark.usefixtures("threads")
def test_with_enough_memory_nothing_fails() -> None:
    source, out = torch.arange(40.0).reshape(5, 8), torch.empty(5, 8)
    with scarce(11):
        runtime.compiled("tiles", _tiles)(buffer(source), 8, buffer(out))
    assert _right(source, out)


def _call(kernel: Any, source: torch.Tensor, out: torch.Tensor) -> Callable[[], None]:
    return lambda: kernel(buffer(source), 8, buffer(out))


def _bound(kernel: Any, source: torch.Tensor, out: torch.Tensor) -> Callable[[], None]:
    return kernel.bind(buffer(source), 8, buffer(out))


def _chain(kernel: Any, source: torch.Tensor, out: torch.Tensor) -> Callable[[], None]:
    return Chain([_bound(kernel, source, out)])


def _moved(kernel: Any, source: torch.Tensor, out: torch.Tensor) -> Callable[[], None]:
    call = KernelCall("tiles", _tiles, [Strided((5, 8), (8, 1)), 8, Strided((5, 8), (8, 1))])
    return lambda: call(source.data_ptr(), out.data_ptr())


@pytest.mark.parametrize("way", [_call, _bound, _chain, _moved])
def test_every_call_looks_at_the_code(way: Callable[..., Callable[[], None]]) -> None:
    source, out = torch.arange(40.0).reshape(5, 8), torch.empty(5, 8)
    with scarce(11):
        run = way(runtime.compiled("tiles", _tiles), source, out)
        run()
        assert _right(source, out)
        with pytest.raises(MemoryError, match="the tiles kernel got no memory"):
            run()


class _Failing:
    """Stands for a kernel that returns a code."""

    def __init__(self, code: int, name: str = "failing") -> None:
        text = f"define i32 @failing(ptr %arguments) {{ ret i32 {code} }}"
        self.name, self.address = name, llvm.assemble(text, "failing")[0]
        self._enter = machine_code._ENTER(entry.functions().enter)

    def bound(self) -> machine_code.Bound:
        from sepconv.kernels.halide.jit.buffers import arguments

        return machine_code.Bound(self, arguments(self.address))  # type: ignore[arg-type]


@pytest.mark.parametrize("code", [-1, -47, 3, 2**31 - 1])
def test_other_codes_are_named_with_the_kernel(code: int) -> None:
    for run in (_Failing(code).bound(), Chain([_Failing(0).bound(), _Failing(code).bound()])):
        with pytest.raises(RuntimeError, match=rf"^the failing kernel failed with Halide's error {code}$"):
            run()


def test_a_chain_stops_at_what_fails_and_names_it() -> None:
    tensors = [torch.full((5, 8), float(i)) for i in range(3)]
    kernel = runtime.compiled("tiles", _tiles)
    calls = [kernel.bind(buffer(tensors[0]), 8, buffer(out)) for out in tensors[1:]]
    tensors[0].fill_(1)
    with pytest.raises(RuntimeError, match=r"^the second kernel failed with Halide's error -7$"):
        Chain([calls[0], _Failing(-7, "second").bound(), calls[1]])()
    assert (tensors[1] == 16).all()
    assert (tensors[2] == 2).all()
    Chain([calls[0], _Failing(0).bound(), calls[1]])()
    assert (tensors[2] == 16).all()


@pytest.mark.usefixtures("threads")
def test_operations_and_compiled_networks_raise() -> None:
    layer = sepconv.SeparableConv2d(32, 48, 3, padding=1).eval()
    x = torch.randn(2, 32, 33, 31).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = layer(x)
        fast = sepconv.compile(layer, x)
        with scarce(0):
            packing._cache.clear()
            with pytest.raises(MemoryError, match="the separable kernel got no memory"):
                layer(x)
        torch.testing.assert_close(layer(x), expected)
        torch.testing.assert_close(fast(x), expected)


def test_memory_for_tiles_is_aligned_and_given_back() -> None:
    """In any order; what is left is given back when the kernel is left."""
    functions = entry.functions()
    take = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)(functions.halide_malloc)
    give = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)(functions.halide_free)
    what = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
    attempt = ctypes.CFUNCTYPE(ctypes.c_int, what, ctypes.c_void_p)(functions.attempt)
    seen = []

    def kernel(context: int, data: int) -> int:
        for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0)):
            for size in (0, 1, 127, 128, 4097, 1 << 20):
                places = [take(context, size) for _ in range(3)]
                seen.extend(place % 128 for place in places)
                for place in places:
                    ctypes.memset(place, 255, size)
                for i in order:
                    give(context, places[i])
        give(context, None)
        return 5

    assert attempt(what(kernel), None) == 5
    assert seen == [0] * 72


def _bytes() -> int:
    """Of address space that this process uses."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def test_without_jumps_kernels_run_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entry, "_jumps", lambda: None)
    functions = entry.functions.__wrapped__()
    attempt = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(functions.attempt)
    assert attempt(llvm.assemble("define i32 @five(ptr %context, ptr %data) { ret i32 5 }", "five")[0], None) == 5


_LEAVING = """
define i32 @kernel(ptr %context, ptr %data) {{
  %a = call ptr inttoptr (i64 {halide_malloc} to ptr)(ptr %context, i64 100000000)
  %b = call ptr inttoptr (i64 {halide_malloc} to ptr)(ptr %context, i64 100000000)
  %c = call ptr inttoptr (i64 {halide_malloc} to ptr)(ptr %context, i64 100000000)
  call void inttoptr (i64 {halide_free} to ptr)(ptr %context, ptr %b)
  call void inttoptr (i64 {leave} to ptr)(ptr %context, i32 -5)
  unreachable
}}
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_kernel_that_is_left_keeps_no_memory() -> None:
    functions = entry.functions()
    attempt = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(functions.attempt)
    kernel = llvm.assemble(_LEAVING.format(**functions._asdict()), "kernel")[0]
    before = _bytes()
    for _ in range(10):
        assert attempt(kernel, None) == -5
    # Beside it a thread may begin a heap of its own, of 64 MiB.
    assert _bytes() - before < 300_000_000


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
def test_a_process_without_memory_gets_an_error_too() -> None:
    rows, columns = 2, 1 << 26  # 256 MiB a tile: more than freed memory that the process still holds
    source, out = torch.ones(rows, columns), torch.empty(rows, columns)
    run = runtime.compiled("tiles", _tiles).bind(buffer(source), columns, buffer(out))
    ctypes.CDLL(None).malloc_trim(0)  # commands that train have let this process keep what they freed
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_bytes() + (1 << 20), before[1]))
    try:
        with pytest.raises(MemoryError, match="the tiles kernel got no memory"):
            run()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    run()
    assert _right(source, out)
