"""Kernels compiled by several processes: the same code as by one, and by this one alone where another fails."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sepconv
from sepconv.kernels.halide.jit import ahead, code_cache, runtime
from sepconv.kernels.halide.jit.ahead import Wanted
from sepconv.kernels.halide.jit.buffers import buffer

pytestmark = pytest.mark.skipif(bool(runtime.missing()), reason=runtime.missing())


@pytest.fixture
def new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No kernel is known, there are two cores, and few kernels are many."""
    folder = tmp_path / "cache"
    monkeypatch.setenv(code_cache.VARIABLE, str(folder))
    monkeypatch.setattr(ahead, "_cores", lambda: 2)
    monkeypatch.setattr(ahead, "_LEAST_KERNELS", 2)
    runtime.clear_cache()
    return folder


def _times(factor: int, broken: bool = False) -> tuple[Any, list[Any]]:
    import halide as hl

    i, source, by, out = hl.Var("i"), hl.ImageParam(hl.Float(32), 1, "source"), hl.Param(hl.Int(32), "by"), hl.Func()
    unused = hl.Param(hl.Float(32), "unused")
    out[i] = hl.strict_float(source[i] * factor + hl.f32(0.5)) + by
    if broken:
        out.vectorize(hl.Var("no_such_loop"))
    return out, [by, source, unused]


def _asked(count: int) -> list[Wanted]:
    return [Wanted(("times", factor), partial(_times, factor), False) for factor in range(1, count + 1)]


def _unbuilt() -> tuple[Any, list[Any]]:
    raise AssertionError("it is compiled once more")


def _right(asked: list[Wanted], builds: Callable[[Wanted], Any] = lambda one: _unbuilt) -> None:
    for one in asked:
        x, out = torch.arange(7.0), torch.full((7,), torch.nan)
        runtime.compiled(one.key, builds(one))(3, buffer(x), 0.25, buffer(out))
        assert torch.equal(out, x * one.key[1] + 3.5)  # type: ignore[index]


@pytest.mark.parametrize("kept", ["on_disk", "in_memory"])
@pytest.mark.parametrize("by", ["both", "the_other"])
def test_either_process_compiles(new: Path, by: str, kept: str, monkeypatch: pytest.MonkeyPatch) -> None:
    me = os.getpid()
    if kept == "in_memory":
        monkeypatch.setenv(code_cache.VARIABLE, "")
    if by == "the_other":
        monkeypatch.setattr(ahead, "_take", lambda folder, number: os.getpid() != me)
    asked = _asked(3)
    ahead.build(asked)
    _right(asked)
    assert new.exists() == (kept == "on_disk")
    if new.exists():  # and once more as a process finds them that starts anew
        runtime.clear_cache()
        _right(asked)


@pytest.mark.parametrize("failure", ["no_fork", "it_ends", "it_hangs", "one_core", "few"])
def test_one_process_is_enough(
    new: Path, failure: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    if failure == "no_fork":
        monkeypatch.setattr(os, "fork", _refused)
    elif failure == "it_ends":
        monkeypatch.setattr(ahead, "_compile_share", _refused)
    elif failure == "it_hangs":
        monkeypatch.setattr(ahead, "_compile_share", lambda new, folder: ahead._take(folder, 2) and time.sleep(100))
        monkeypatch.setattr(ahead, "_PATIENCE", 0.1)
        monkeypatch.setattr(ahead, "_take", _slowly(ahead._take))
    elif failure == "one_core":
        monkeypatch.setattr(ahead, "_cores", lambda: 1)
    else:
        monkeypatch.setattr(ahead, "_LEAST_KERNELS", 9)
    asked = _asked(3)
    ahead.build(asked)
    known = {"it_ends": 3, "it_hangs": 2}.get(failure, 0)
    assert [runtime.known(one.key) for one in asked] == [i < known for i in range(3)]
    _right(asked, lambda one: one.build)
    assert capfd.readouterr() == ("", "")
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def _refused(*given: Any) -> Any:
    raise OSError("not here")


def _slowly(take: Callable[[Path, int], bool]) -> Callable[[Path, int], bool]:
    """This process takes nothing before the other has taken the last."""
    me = os.getpid()

    def taken(folder: Path, number: int) -> bool:
        while os.getpid() == me and not (folder / "2.taken").exists():
            time.sleep(0.001)
        return take(folder, number)

    return taken


def test_what_cannot_be_compiled_tells_the_reason_when_it_is_needed(new: Path) -> None:
    asked = [*_asked(2), Wanted(("times", "broken"), partial(_times, 5, broken=True), False)]
    ahead.build(asked)
    _right(asked[:2])
    assert not runtime.known(asked[2].key)
    with pytest.raises(runtime.BuildError, match=r"Halide cannot build \(.*no_such_loop"):
        runtime.compiled(asked[2].key, asked[2].build)


def test_what_is_known_is_not_compiled_again(new: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = _asked(2)
    _right(asked, lambda one: one.build)
    monkeypatch.setattr(os, "fork", _unbuilt)
    ahead.build(asked)


class _Small(nn.Module):
    """Several kinds of kernels, one of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 1)
        self.second = nn.Conv2d(16, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.second(self.first(x)))
        return nn.functional.max_pool2d(y.sigmoid(), 2).mean((2, 3))


def test_a_network_asks_for_all_its_kernels(new: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Wanted] = []
    build, me = ahead.build, os.getpid()

    def noting(given: list[Wanted]) -> None:
        asked.extend(given)
        build(given)

    monkeypatch.setattr(ahead, "build", noting)
    monkeypatch.setattr(ahead, "_take", lambda folder, number: os.getpid() != me)
    monkeypatch.setattr(runtime, "_object_code", _refused)
    model, x = _Small().eval(), torch.randn(2, 3, 23, 29)
    with torch.no_grad():
        compiled = sepconv.compile(model, x)
        assert {group.kernel for group in compiled.explain().groups} == {"halide"}
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    assert len(asked) == len({(one.key, one.old) for one in asked}) >= 3
