"""Forked children compute what their parent does: at old and new sizes, through kernels and through PyTorch, and train.

Each case is a process of its own, whose children have to be done within a time: what is wrong here hangs.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from sepconv.kernels.halide.jit import runtime

pytestmark = [
    pytest.mark.skipif(bool(runtime.missing()), reason=runtime.missing()),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork"),
]

_START = """
import os, signal, sys, threading, time, warnings
import torch
from torch import nn
import sepconv
from sepconv.kernels.halide.jit import entry, forks, llvm, machine_code, packing, runtime, threads
warnings.filterwarnings("ignore", message=".*multi-threaded.*", category=DeprecationWarning)
torch.manual_seed(0)
torch.set_num_threads(2)

def in_child(work, seconds=60):
    "Whether a child comes to an end with True."
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        signal.alarm(seconds)
        try:
            os._exit(0 if work() else 1)
        except BaseException as error:
            print(type(error).__name__, error, file=sys.stderr, flush=True)
            os._exit(2)
    return os.waitpid(child, 0)[1] == 0

def same(a, b):
    return torch.allclose(a, b, rtol=1e-4, atol=1e-4)

x = {side: torch.randn(2, 3, side, side) for side in (32, 40, 48)}
model = nn.Sequential(
    nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(),
    sepconv.SeparableConv2d(16, 32, 3, padding=1, norm="batch", activation="relu"),
    nn.GroupNorm(4, 32), sepconv.SeparableConv2d(32, 32, 3, padding=1), nn.AdaptiveAvgPool2d(1),
).eval()
with torch.no_grad():
    expected = {side: model(image) for side, image in x.items() if side < 48}

def train():
    layer = sepconv.SeparableConv2d(16, 32, 3, padding=1, norm="batch")
    layer(torch.randn(8, 16, 30, 30)).square().mean().backward()
    (torch.randn(400, 400) @ torch.randn(400, 400)).sum()
    nn.functional.conv2d(torch.randn(4, 16, 56, 56), torch.randn(16, 16, 3, 3))
    return all(p.grad is not None for p in layer.parameters())

def serve():
    "At sizes that the parent knows and one that it does not."
    with torch.no_grad():
        known = [same(f(x[side]), expected[side]) for f in served for side in expected]
        return all(known) and all(same(f(x[48]), model(x[48])) for f in served)

served = [model]
"""


def _run(script: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", _START + script], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split()


def test_children_serve_and_train() -> None:
    """As in a server that loads and warms up before it forks; with all threads, which are there in the parent too."""
    script = """
served += [sepconv.compile(model, x[32], threads=threads) for threads in (None, 2)]
[f(x[32]) for f in served], train()
print(in_child(serve), in_child(train), in_child(lambda: serve() and in_child(serve) and train()))
print(in_child(lambda: torch.get_num_threads() == 2 and not threads.alone()), serve(), torch.get_num_threads())
"""
    assert _run(script) == ["True", "True", "True", "True", "True", "2"]


def test_children_of_a_thread_that_is_not_the_first() -> None:
    script = """
found = []
def work():
    train(); found.append(in_child(lambda: serve() and train()))
for _ in range(2):
    thread = threading.Thread(target=work); thread.start(); thread.join()
print(*found, serve())
"""
    assert _run(script) == ["True", "True", "True"]


@pytest.mark.slow
def test_where_workers_cannot_be_ended_a_child_computes_alone_and_says_so() -> None:
    """As where a server that is not Python forks: nothing is called in the parent."""
    script = """
threads._end_workers = lambda: False
served += [sepconv.compile(model, x[32], threads=2)]
train()
def work():
    right = serve() and train() and threads.alone()
    runtime.compiled("doubling", build)
    return right and torch.get_num_threads() == 1 and threads._threads.value == 1 and in_child(train)
def build():
    import halide as hl
    i, source, out = hl.Var("i"), hl.ImageParam(hl.Float(32), 1, "source"), hl.Func("out")
    out[i] = source[i] * 2
    return out, [source]
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    def and_said():
        return work() and [str(w.message)[:46] for w in said if w.category is RuntimeWarning] == [
            "sepconv: OpenMP's threads do not survive this f"[:46]]
    print(in_child(and_said))
torch.set_num_threads(1)
print(in_child(lambda: serve() and train()), serve(), threads.alone())
"""
    assert _run(script) == ["True", "True", "True", "False"]


def test_a_fork_waits_for_what_another_thread_compiles() -> None:
    """Halide and LLVM have locks of their own."""
    script = """
os.environ["SEPCONV_CACHE_DIR"] = ""  # built anew
torch.set_num_threads(1)
inside, order = threading.Event(), []
def build():
    inside.set(); time.sleep(0.5); order.append("built")
    import halide as hl
    i, source, out = hl.Var("i"), hl.ImageParam(hl.Float(32), 1, "source"), hl.Func("out")
    out[i] = source[i] * 3
    return out, [source]
thread = threading.Thread(target=runtime.compiled, args=("slow", build)); thread.start(); inside.wait()
with forks.undivided():  # what this thread does itself is nothing to wait for
    print(in_child(lambda: order == ["built"] and serve()), in_child(lambda: runtime.compiled("slow", None) and True))
thread.join()
"""
    assert _run(script) == ["True", "True"]


def test_no_lock_stays_held_in_a_child() -> None:
    script = """
torch.set_num_threads(1)
def hold(lock, held, done):
    with lock():
        held.set(); done.wait()
locks = [lambda: packing._lock, lambda: runtime._cache_lock, lambda: machine_code._loading]
for lock in locks:
    held, done = threading.Event(), threading.Event()
    thread = threading.Thread(target=hold, args=(lock, held, done)); thread.start(); held.wait()
    print(in_child(lambda: serve() and runtime.clear_cache() is None and serve()))
    done.set(); thread.join()
"""
    assert _run(script) == ["True"] * 3
