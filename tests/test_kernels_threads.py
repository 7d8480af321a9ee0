"""Halide's parallel loops on PyTorch's threads: every pass once, errors come back, forks and counts are followed."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from sepconv.kernels.halide.jit import entry, llvm, runtime, threads

pytestmark = pytest.mark.skipif(bool(runtime.missing()), reason=runtime.missing())

_TASK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)
_LOOP = ctypes.CFUNCTYPE(ctypes.c_int, _TASK, ctypes.c_int, ctypes.c_int, ctypes.c_void_p)
# A kernel that consists of nothing but a parallel loop.
_KERNEL = """
%asked = type {{ ptr, i32, i32, ptr }}

define internal i32 @inside(ptr %context, ptr %asked) {{
  %given = load %asked, ptr %asked
  %task = extractvalue %asked %given, 0
  %first = extractvalue %asked %given, 1
  %count = extractvalue %asked %given, 2
  %data = extractvalue %asked %given, 3
  %ignored = call i32 inttoptr (i64 {loop} to ptr)(ptr %context, ptr %task, i32 %first, i32 %count, ptr %data)
  ret i32 0
}}

define i32 @kernel(ptr %task, i32 %first, i32 %count, ptr %data) {{
  %asked = alloca %asked
  %a = insertvalue %asked undef, ptr %task, 0
  %b = insertvalue %asked %a, i32 %first, 1
  %c = insertvalue %asked %b, i32 %count, 2
  %d = insertvalue %asked %c, ptr %data, 3
  store %asked %d, ptr %asked
  %code = call i32 inttoptr (i64 {attempt} to ptr)(ptr @inside, ptr %asked)
  ret i32 %code
}}
"""


@pytest.fixture
def loop() -> Any:
    """A kernel with the parallel loop that Halide calls, to be called with Python functions as tasks."""
    if threads.missing():
        pytest.skip(threads.missing())
    code = _KERNEL.format(loop=threads.loop(), attempt=entry.functions().attempt)
    return _LOOP(llvm.assemble(code, "kernel")[0])


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
    threads.follow_torch()


def test_pytorchs_threads_are_taken_on_linux() -> None:
    if sys.platform == "linux":
        assert threads.missing() == ""


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("passes", [0, 1, 2, 5, 64])
def test_each_pass_runs_once(loop: Any, count: int, passes: int) -> None:
    torch.set_num_threads(count)
    threads.follow_torch()
    seen, workers = [], set()

    def task(context: int, index: int, data: int) -> int:
        seen.append((index, data))
        workers.add(threading.get_native_id())
        return 0

    assert loop(_TASK(task), 3, passes, 32) == 0
    assert sorted(seen) == [(3 + i, 32) for i in range(passes)]
    assert len(workers) <= min(count, passes)


def test_several_threads_take_part(loop: Any) -> None:
    torch.set_num_threads(2)
    threads.follow_torch()
    both = threading.Barrier(2, timeout=30)  # passed only where two passes run at the same time

    def task(context: int, index: int, data: int) -> int:
        both.wait()
        return 0

    assert loop(_TASK(task), 0, 2, None) == 0


def test_each_thread_has_neighbouring_passes_of_its_own(loop: Any) -> None:
    """What it reads in one loop it has written in another; the passes of a late one are taken by the others."""
    torch.set_num_threads(2)
    threads.follow_torch()
    both, first = threading.Barrier(2, timeout=30), {}

    def task(context: int, index: int, data: int) -> int:
        worker = threading.get_native_id()
        if worker not in first:
            first[worker] = index
            both.wait()
        return 0

    for _ in range(3):
        first.clear()
        assert loop(_TASK(task), 0, 65, None) == 0
        assert sorted(first.values()) == [0, 32]
        assert first[threading.get_native_id()] == 0


@pytest.mark.parametrize("count", [1, 2])
def test_an_error_ends_the_loop_and_comes_back(loop: Any, count: int) -> None:
    torch.set_num_threads(count)
    threads.follow_torch()
    seen = []

    def task(context: int, index: int, data: int) -> int:
        seen.append(index)
        return -7 if index == 5 else 0

    assert loop(_TASK(task), 0, 1000, None) == -7
    assert len(seen) < 1000


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_forked_child_has_threads_of_its_own(loop: Any) -> None:
    torch.set_num_threads(2)
    threads.follow_torch()

    def together() -> bool:
        both = threading.Barrier(2, timeout=30)
        return loop(_TASK(lambda context, index, data: both.wait() * 0), 0, 2, None) == 0 and not both.broken

    assert together()
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        os._exit(0 if together() else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert together()


_CASE = """
import torch, sepconv
x, w = torch.randn(8, 64, 31, 31), torch.randn(64, 1, 7, 7)
truth = torch.nn.functional.conv2d(x, w, None, 1, 3, 1, 64)
for count in (1, 2):
    torch.set_num_threads(count)
    [choice] = sepconv.explain(sepconv.depthwise_conv2d, x, w, None, 1, 3)
    right = bool((sepconv.depthwise_conv2d(x, w, None, 1, 3) - truth).abs().max() < 1e-4)
    print(choice.kernel, right, choice.reasons.get("halide", ""))
"""


@pytest.mark.parametrize(
    ("spoil", "kernels", "reason"),
    [
        ("import sys; sys.modules['llvmlite'] = None", ["torch", "torch"], "pip install llvmlite"),
        (
            "from sepconv.kernels.halide.jit import threads; threads._address = lambda name: None",
            ["halide", "torch"],
            "GOMP_",
        ),
    ],
    ids=["llvmlite", "openmp"],
)
def test_without_a_part_pytorch_computes_and_the_reason_is_given(spoil: str, kernels: list[str], reason: str) -> None:
    """In a process of its own, since what was loaded stays loaded."""
    run = subprocess.run([sys.executable, "-c", spoil + _CASE], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = [line.split(" ", 2) for line in run.stdout.strip().splitlines()]
    assert [kernel for kernel, _, _ in found] == kernels
    assert [right for _, right, _ in found] == ["True", "True"]
    assert reason in found[1][2]
