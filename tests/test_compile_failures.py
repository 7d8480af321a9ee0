"""Whatever fails while a model is prepared, the model or the group runs through PyTorch, and the reason is said."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from networks import SamePadded, randomise

from sepconv.compile import compile
from sepconv.kernels.halide.jit import runtime


@pytest.fixture(
    params=[
        "prepare.capture", "prepare.rewrite", "prepare.disagreement", "prepare.trial_copy", "passes.fold_constants",
        "network.write_program", "network.lay_out", "network.lower", "layout.slice_batch", "instance.bind_step",
        "bind._bind_kernels", "instance.in_chains",
    ]
)  # fmt: skip
def stage(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A step of compiling that fails as a defect of ours would."""

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise IndexError("injected")

    module, name = request.param.split(".")
    monkeypatch.setattr(importlib.import_module(f"sepconv.compile.{module}"), name, broken)
    return str(request.param)


def test_compile_runs_the_model_whatever_fails_inside(stage: str) -> None:
    model, x = randomise(SamePadded()), torch.randn(1, 3, 17, 22)
    if stage == "bind._bind_kernels":  # the group alone
        if runtime.missing():
            pytest.skip(runtime.missing())
        with pytest.warns(UserWarning, match="compile: a group runs through PyTorch: IndexError: injected"):
            fast = compile(model, x)
        reasons = {group.kind: group.reason for group in fast.explain().groups}
        assert reasons["normal"] == reasons["separable"] == "IndexError: injected"
    else:
        with pytest.warns(UserWarning, match="compile: the model runs through PyTorch: .*IndexError: injected") as seen:
            fast = compile(model, x)
        assert len(seen) == 1
        fast(torch.randn(2, 3, 17, 22))  # warns no second time
        assert "IndexError: injected" in fast.explain().reason
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)


def test_backend_runs_the_graph_whatever_fails_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> Any:
        raise IndexError("injected")

    monkeypatch.setattr(importlib.import_module("sepconv.compile.network"), "lay_out", broken)
    model, x = randomise(SamePadded()), torch.randn(1, 3, 17, 22)
    torch.compiler.reset()
    fast = torch.compile(model, backend="sepconv")
    with torch.no_grad(), pytest.warns(UserWarning, match="a graph runs through PyTorch: .*IndexError: injected"):
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
    torch.compiler.reset()


def test_compile_keeps_the_usual_kernels_where_tuning_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> Any:
        raise IndexError("injected")

    monkeypatch.setattr(importlib.import_module("sepconv.compile.tune"), "fastest", broken)
    model, x = randomise(SamePadded()), torch.randn(1, 3, 17, 22)
    if runtime.missing():
        pytest.skip(runtime.missing())
    with pytest.warns(UserWarning, match=r"the usual kernels run, tuning failed \(IndexError: injected\)"):
        fast = compile(model, x, tune=True)
    assert fast.explain().reason == ""
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
