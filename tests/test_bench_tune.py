"""Tuning: what is tried, what is kept on disk, and what a table may change."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_run import sepconv as run
from torch import Tensor, nn

import sepconv
from sepconv.bench import tune
from sepconv.kernels.case import Case, pool
from sepconv.kernels.halide.conv import separable
from sepconv.kernels.halide.jit import code_cache, runtime
from sepconv.kernels.halide.schedule import tuned
from sepconv.kernels.halide.schedule.gemm import SeparableSchedule
from sepconv.ops.call import forget
from sepconv.system.timing import Timing

if runtime.missing():
    pytest.skip(runtime.missing(), allow_module_level=True)


@pytest.fixture(autouse=True)
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty table; kernels that were compiled before are used again."""
    kernels = code_cache.folder()
    assert kernels is not None
    (tmp_path / "kernels").symlink_to(kernels)
    monkeypatch.setenv(code_cache.VARIABLE, str(tmp_path))
    tuned.forget()
    forget()
    path = tuned.path()
    assert path is not None
    yield path
    monkeypatch.undo()
    tuned.forget()
    forget()


class Small(nn.Module):
    """One kernel of each kind that is tuned."""

    def __init__(self) -> None:
        super().__init__()
        self.block = sepconv.SeparableConv2d(16, 32, 3, padding=1, activation="relu")
        self.mix = sepconv.PointwiseConv2d(32, 24)
        self.last = sepconv.DepthwiseConv2d(24, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.mix(torch.tanh(self.block(x)))))


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not all of the schedules: each has to be compiled."""
    problems = tune.problems

    def trimmed(model: nn.Module, example: Tensor, threads: int) -> dict[str, Any]:
        found = problems(model, example, threads)
        return {
            key: asked._replace(others=[o for o in asked.others if o != asked.usual][:2])
            for key, asked in list(found.items())[-4:]
        }

    monkeypatch.setattr(tune, "problems", trimmed)


def win(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Let the clock say that the schedule of this number is twice as fast as the others."""

    def timings(calls: dict[str, Any], seconds: float) -> dict[str, Timing]:
        assert seconds == 0.01
        return {name: Timing(1.0 if name == str(number) else 2.0, 0.0, 0.0, 1) for name in calls}

    monkeypatch.setattr(tune, "interleaved", timings)


X = (1, 16, 13, 11)


def tuned_model(monkeypatch: pytest.MonkeyPatch, number: int) -> list[tune.Tuned]:
    win(monkeypatch, number)
    return [found for _, _, found in tune.run(Small().eval(), torch.randn(X), [1], 0.01)]


def test_each_kernel_of_a_network_is_tuned_and_the_table_is_used(monkeypatch: pytest.MonkeyPatch, table: Path) -> None:
    found = tuned_model(monkeypatch, 1)
    assert {one.kind for one in found} == {"separable", "pointwise", "depthwise"}
    assert all(one.best != one.usual and one.usual_ms == 2 * one.best_ms for one in found)
    content = json.loads(table.read_text())
    assert len(content["schedules"]) == len(found)
    [best] = [one.best for one in found if one.kind == "separable"]
    [asked] = [
        asked for asked in tune.problems(Small().eval(), torch.randn(X), 1).values() if asked.kind == "separable"
    ]
    chosen = separable.plan(asked.case)
    assert (chosen.spec.tile, chosen.spec.columns) == (best.tile, best.columns)
    assert chosen.calls[0][0] == best.rows
    assert asked.usual != best

    model, x = Small().eval(), torch.randn(X)
    with torch.no_grad():
        truth = model.double()(x.double())
        y = sepconv.compile(model.float(), x)(x)
    torch.testing.assert_close(y.double(), truth, rtol=1e-4, atol=1e-5)


def test_without_a_gain_nothing_is_written(monkeypatch: pytest.MonkeyPatch, table: Path) -> None:
    found = tuned_model(monkeypatch, 0)
    assert all(one.best == one.usual for one in found)
    assert not table.exists()


def test_a_narrow_win_is_noise(monkeypatch: pytest.MonkeyPatch, table: Path) -> None:
    monkeypatch.setattr(
        tune,
        "interleaved",
        lambda calls, seconds: {name: Timing(1.0 if name == "0" else 0.98, 0.0, 0.0, 1) for name in calls},
    )
    list(tune.run(Small().eval(), torch.randn(X), [1], 0.01))
    assert not table.exists()


@pytest.mark.parametrize("fault", [lambda out: out.zero_(), lambda out: None], ids=["zeros", "nothing written"])
def test_a_schedule_that_computes_something_else_is_refused(
    monkeypatch: pytest.MonkeyPatch, table: Path, fault: Any
) -> None:
    maker = tune._maker

    def wrong(case: Case) -> Any:
        make, made = maker(case), []
        if case.op != "separable":
            return make

        def spoiled() -> Any:
            call, out = make()
            made.append(out)
            if len(made) < 3:
                return call, out
            out.copy_(made[0])  # as memory that a better schedule has filled before
            return lambda: fault(out), out

        return spoiled

    monkeypatch.setattr(tune, "_maker", wrong)
    with pytest.raises(ValueError, match=r"bench tune: SeparableSchedule\(.*op='separable'.* gives another result"):
        tuned_model(monkeypatch, 1)
    assert not table.exists()


CASE = pool(torch.empty(1, 4, 2, 2), torch.empty(1, 4))  # which one does not matter to the table
USUAL = SeparableSchedule(*["tile", 1, 4, 16, "rows"])


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[",
        "[" * 100_000,
        "[]",
        "{}",
        '{"schedules": 3}',
        '{"schedules": {"KEY": 7}}',
        '{"schedules": {"KEY": ["tile", 9, 4, 16, "rows"]}}',
    ],
    ids=lambda content: content[:40],
)
def test_a_table_that_makes_no_sense_changes_nothing(table: Path, content: str) -> None:
    others = [USUAL._replace(rows=2), USUAL._replace(columns=8)]
    key = tuned.key("separable", (1, "a"))
    table.parent.mkdir(parents=True)
    table.write_text(content.replace('"KEY"', json.dumps(key)))
    assert tuned.choose("separable", (1, "a"), USUAL, lambda: others, CASE) == USUAL


def test_the_table_grows_and_is_for_one_problem(table: Path) -> None:
    others = [USUAL._replace(rows=2), USUAL._replace(columns=8)]
    for number, other in enumerate(others):
        tuned.keep({tuned.key("separable", (number, "a")): other})
    for number, other in enumerate(others):
        assert tuned.choose("separable", (number, "a"), USUAL, lambda: others, CASE) == other
    assert tuned.choose("separable", (2, "a"), USUAL, lambda: others, CASE) == USUAL
    assert tuned.choose("pointwise", (0, "a"), USUAL, lambda: others, CASE) == USUAL


def test_without_a_folder_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(code_cache.VARIABLE, "")
    assert tuned.keep({tuned.key("separable", (1,)): USUAL}) is None
    assert tuned.table() == {}


def test_what_cannot_be_tuned_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="threads must be positive"):
        list(tune.run(Small(), torch.randn(X), [0], 1.0))
    with monkeypatch.context() as unkept:
        unkept.setenv(code_cache.VARIABLE, "")
        with pytest.raises(ValueError, match=f"cannot be kept: {code_cache.VARIABLE} is empty"):
            list(tune.run(Small(), torch.randn(X), [1], 1.0))
    (tmp_path / "file").touch()
    with monkeypatch.context() as full:
        full.setenv(code_cache.VARIABLE, str(tmp_path / "file"))
        with pytest.raises(OSError, match="cannot write to the folder"):
            next(tune.run(Small(), torch.randn(X), [1], 1.0))
    monkeypatch.setattr(runtime, "missing", lambda: "there is no wheel")
    with pytest.raises(ValueError, match="bench tune: there is no wheel"):
        tune.problems(Small(), torch.randn(X), 1)


def test_command(table: Path) -> None:
    network = ("mobilenet_v1", "--set", "width_mult=0.25", "--input", "3x32x32")
    ran = run("bench", "tune", *network, "--seconds", "0.001", "--json", "-", "--quiet")
    assert ran.code == 0, ran.err
    record = json.loads(ran.out)
    assert {one["kind"] for one in record["kernels"]} == {"separable", "pointwise"}
    assert all(one["best_ms"] <= one["usual_ms"] and one["tried"] >= 1 for one in record["kernels"])
    assert record["table"] == str(table)
    run("bench", "tune", *network, "--threads", "two").failed_with(2, "--threads must be positive", "'two'")
