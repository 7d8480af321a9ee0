"""Models of unusual kinds: each is converted, or refused before the work with the layer and the cause."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from convertible import conv, images
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import sepconv
from sepconv.convert import Plan, closed_form, conversion
from sepconv.convert.forms import bottleneck_fit


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    return nn.Sequential(conv(3, 6), nn.BatchNorm2d(6), nn.ReLU(), conv(6, 5)).to(dtype).eval()


X = images(10, 7, torch.float32)


def convert(model: nn.Module, x: Any = X, **arguments: Any) -> tuple[nn.Module, Plan]:
    return sepconv.convert(model, x, **{"depth_multiplier": 2, "sweeps": 1, "form": "separable", **arguments})


class Wrap(nn.Module):
    """What a small network answers, changed by a function."""

    def __init__(self, change: Callable[[Tensor], Any], model: nn.Module | None = None) -> None:
        super().__init__()
        self.net, self.change = model or net(), change

    def forward(self, x: Tensor) -> Any:
        return self.change(self.net(x))


def with_layer(change: Callable[[nn.Module], object], index: int = 3) -> nn.Module:
    model = net()
    change(model[index])
    return model


def old_norm(kind: Callable[[nn.Module], object]) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = with_layer(kind)
    model(X).sum().backward()
    return model


UNDONE = {
    "pruned": (
        lambda: with_layer(lambda c: prune.l1_unstructured(c, "weight", 0.5)),
        r"prune\.remove\(layer, 'weight'\)",
    ),
    "bias pruned": (
        lambda: with_layer(lambda c: prune.random_unstructured(c, "bias", 0.5)),
        r"remove\(layer, 'bias'\)",
    ),
    "weight norm": (lambda: old_norm(nn.utils.weight_norm), r"\(WeightNorm\); torch\.nn\.utils\.remove_weight_norm"),
    "spectral norm": (
        lambda: old_norm(nn.utils.spectral_norm),
        r"\(SpectralNorm\); torch\.nn\.utils\.remove_spectral_n",
    ),
    "new weight norm": (
        lambda: with_layer(parametrizations.weight_norm),
        r"\(_WeightNorm\); .*remove_parametrizations",
    ),
    "orthogonal": (lambda: with_layer(parametrizations.orthogonal), r"\(_Orthogonal\); .*tions\(layer, 'weight'\)"),
}


@pytest.mark.filterwarnings("ignore:.*jit:DeprecationWarning")
@pytest.mark.parametrize(("make", "reason"), UNDONE.values(), ids=UNDONE)
def test_a_weight_made_of_others_stays_and_how_to_undo_it_is_said(make: Callable[[], nn.Module], reason: str) -> None:
    model = make()
    new, plan = convert(model)
    assert [row.rank for row in plan.layers] == [2, 0]
    with pytest.raises(ValueError, match=f"^convert: Sequential has no convolution to convert .*{reason}"):
        convert(model, skip=["0"])
    assert new(X).shape == (10, 5, 7, 7)


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return nn.Sequential(conv(3, 6), torch.jit.script(conv(6, 5)))


def traced() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.trace(net(), X)


def nan(tensor: Tensor) -> None:
    tensor.data.view(-1)[0] = float("nan")


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return net()


def locked() -> nn.Module:
    model = net()
    model[2].lock = threading.Lock()
    return model


def exported() -> nn.Module:
    return torch.export.export(net(), (X,)).module()


REFUSED = {
    "script": (
        scripted,
        r"layer '1' \(RecursiveScriptModule\) is TorchScript, which cannot be changed; convert the mod",
    ),
    "trace": (traced, r"the model \(TopLevelTracedModule\) is TorchScript"),
    "exported": (
        exported,
        r"the model \(GraphModule\) was made by torch\.export; convert the module it was exported fr",
    ),
    "lazy": (
        lambda: nn.Sequential(nn.LazyConv2d(3, 3)),
        r"weight of layer '0' \(LazyConv2d\) has no shape yet; run the",
    ),
    "meta": (
        on_meta,
        r"weight of layer '0' \(Conv2d\) has no values \(it is on the meta device\); load the weights firs",
    ),
    "NaN": (lambda: with_layer(lambda c: nan(c.bias)), r"bias of layer '3' \(Conv2d\) holds NaN or infinity"),
    "NaN mean": (
        lambda: with_layer(lambda n: nan(n.running_mean), 1),
        r"running_mean of layer '1' \(BatchNorm2d\) holds N",
    ),
    "variance": (
        lambda: with_layer(lambda n: n.running_var.neg_(), 1),
        r"running_var of layer '1' .* holds negative num",
    ),
    "lock": (locked, r"lock of layer '2' \(ReLU\) cannot be copied \(TypeError: cannot pickle"),
    "fails": (
        lambda: Wrap(lambda y: y.view(3, 3)),
        r"the model \(Wrap\) fails on inputs of shape \(2, 3, 7, 7\) \(Runti",
    ),
    "layer fails": (
        lambda: nn.Sequential(conv(4, 4)),
        r"layer '0' \(Conv2d\) fails on inputs of shape \(2, 3, 7, 7\) \(R",
    ),
    "overflow": (
        lambda: with_layer(lambda c: c.weight.data.fill_(3e38)),
        r"the output of layer '3' \(Conv2d\) holds NaN",
    ),
    "half": (
        lambda: Wrap(lambda y: y.bfloat16() @ torch.ones(7, 2).bfloat16() @ conv(2, 2).weight, net(torch.half)),
        "fl",
    ),
    "shapes": (lambda: Wrap(lambda y: y[y > 0.05]), r"the outputs of the model change their shapes from "),
    "lengths": (lambda: Wrap(lambda y: [*y[y > 0.05]]), r"the outputs of the model change their shapes from "),
}


@pytest.mark.parametrize(("make", "reason"), REFUSED.values(), ids=REFUSED)
def test_refused_before_the_work(make: Callable[[], nn.Module], reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    monkeypatch.setattr(conversion, "_prepare", lambda *_: pytest.fail("the work has begun"))
    with pytest.raises(ValueError, match=f"^convert: .*{reason}"):
        convert(model)


def test_what_is_no_module_and_what_is_no_image() -> None:
    with pytest.raises(TypeError, match=r"got ExportedProgram; convert the module it was exported from"):
        convert(torch.export.export(net(), (X,)))
    with pytest.raises(TypeError, match=r"calibration must be a tensor or batches of tensors \(.*\), got str"):
        convert(net(), ["x"])
    with pytest.raises(ValueError, match=r"calibration images have no values"):
        convert(net(), X.to("meta"))
    with pytest.raises(ValueError, match=r"calibration images must have shape \(N, C, \*\), got \(10,\)"):
        convert(net(), X[:, 0, 0, 0])
    with pytest.raises(ValueError, match=r"example_input images have no values"):
        convert(net(), None, method="svd", example_input=X.to("meta"))
    with pytest.raises(ValueError, match=r"ridge must be at least 0 and finite, got nan"):
        convert(net(), ridge=float("nan"))
    with pytest.raises(ValueError, match=r"sweeps must be a whole number, at least 0, got -1"):
        convert(net(), sweeps=-1)


def test_a_model_of_two_inputs_says_what_to_do() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, x: Tensor, *, other: Tensor) -> Tensor:
            return self.net(x + other)

    with pytest.raises(ValueError, match=r"\(Two\) fails .*; batches of a model of several inputs are dicts .*'other'"):
        convert(Two(), [(X, X)])


def test_quantized_layers_are_named_as_the_cause() -> None:
    class Quantized(nn.Identity):
        pass

    Quantized.__module__ = "torch.ao.nn.quantized.modules.conv"
    with pytest.raises(
        ValueError, match=r"has no nn\.Conv1d/2d/3d at all; some of its layers are quantized: convert th"
    ):
        convert(nn.Sequential(Quantized()))


@pytest.mark.parametrize("form", ["separable", "bottleneck"])
@pytest.mark.parametrize("budget", [None, 0.6])
@pytest.mark.parametrize(
    "case", ["zero layer", "first zero", "all zero", "constant images", "zero images", "one image", "tiny"]
)
def test_degenerate_layers_and_images(case: str, budget: float | None, form: str) -> None:
    model, x = net(), X
    if case in ("zero layer", "first zero"):
        nn.init.zeros_(model[3 if case == "zero layer" else 0].weight)
    elif case == "all zero":
        for p in model.parameters():
            nn.init.zeros_(p)
    elif case == "tiny":
        for p in model.parameters():
            p.data *= 1e-30
    else:
        x = {"constant images": torch.full_like(X, 0.3), "zero images": torch.zeros_like(X), "one image": X[:1]}[case]
    arguments = {"depth_multiplier": 1} if budget is None else {"depth_multiplier": None, "budget": budget}
    new, plan = convert(model, x, form=form, **arguments)
    assert all(p.isfinite().all() for p in new.parameters())
    assert plan.converted
    assert all(0 <= stage["output_error"] < 2 for stage in plan.stages)
    if case == "zero layer" and budget is None:
        # Nothing that the first layer does reaches the output; its error is told all the same.
        assert plan.layers[0].error > 0.01
    if case in ("constant images", "zero images"):
        # What is the same everywhere is answered right by the bias alone.
        torch.testing.assert_close(new(x).mean((0, 2, 3)), model(x).mean((0, 2, 3)), rtol=0.02, atol=0.02)


def test_a_layer_that_cannot_be_fitted_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> Tensor:
        return torch.linalg.cholesky(-torch.eye(3))

    with pytest.raises(ValueError, match=r"layer '0' \(Conv2d\) sees or passes back values too large for float32"):
        convert(nn.Sequential(conv(3, 6)), X * 1e25)
    monkeypatch.setattr(bottleneck_fit, "solve", fails)
    with pytest.raises(
        ValueError, match=r"layer '0' \(Conv2d\) cannot be fitted \(linalg\.cholesky.*; raise ridge, or"
    ):
        convert(net(), X, form="bottleneck")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_converted_in_float32_and_comes_back(dtype: torch.dtype) -> None:
    model = net()
    wide, plan = convert(model.to(dtype).float())
    model = model.to(dtype)
    model[1].running_mean = model[1].running_mean.float()
    new, same = convert(model, X.to(dtype).float() if dtype == torch.float16 else X)
    assert [row.error for row in same.layers] == pytest.approx([row.error for row in plan.layers], rel=0.1)
    types = {name: t.dtype for name, t in new.named_parameters()} | {"mean": new[1].running_mean.dtype}
    assert types.pop("mean") == torch.float32
    assert set(types.values()) == {dtype}
    assert {p.dtype for p in model.parameters()} == {dtype}
    for mine, theirs in zip(new.parameters(), wide.parameters(), strict=True):
        torch.testing.assert_close(mine.float(), theirs, rtol=0.05, atol=0.05)
    simple = closed_form(model, same)
    assert {p.dtype for p in simple.parameters()} == {dtype}


def test_inference_tensors_and_the_callers_modes() -> None:
    with torch.inference_mode():
        model, x = net(), X.clone()
        torch.manual_seed(1)
        state = torch.get_rng_state()
        first, _ = convert(model, x)
        assert torch.equal(torch.get_rng_state(), state)
        assert all(p.is_inference() for p in model.parameters())
    assert not any(p.is_inference() for p in first.parameters())
    first(X).sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        second, _ = convert(model, x)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_compiled_models_are_converted_as_what_they_were_made_of() -> None:
    model = net()
    plain, _ = convert(model)
    inner = net()
    inner.load_state_dict(model.state_dict())
    inner[3] = torch.compile(inner[3], backend="eager")
    for other in (torch.compile(model, backend="eager"), inner):
        new, plan = convert(other)
        assert [row.name for row in plan.layers] == ["0", "3"]
        assert all(torch.equal(a, b) for a, b in zip(new.parameters(), plain.parameters(), strict=True))
    assert type(inner[3]).__name__ == "OptimizedModule"


@dataclass
class Out:
    y: Tensor


OUTPUTS: dict[str, Callable[[Tensor], Any]] = {
    "scalar beside": lambda y: {"y": y, "loss": y.mean(), "count": 3, "name": None},
    "scalar alone": lambda y: y.square().mean(),
    "vector": lambda y: y.mean((1, 2, 3)),
    "dataclass": Out,
    "transposed": lambda y: y.mean((2, 3)).T,
}


@pytest.mark.parametrize("change", OUTPUTS.values(), ids=OUTPUTS)
def test_outputs_of_any_structure(change: Callable[[Tensor], Any]) -> None:
    new, plan = convert(Wrap(change), depth_multiplier=None, budget=0.7)
    assert plan.converted
    assert all(0 < stage["output_error"] < 5 for stage in plan.stages)
    assert plan.notes == []
    new(X)


def test_images_of_several_sizes_through_a_dense_network() -> None:
    _, plan = convert(net(), [X, images(6, 9, torch.float32)], depth_multiplier=6)
    assert all(stage["output_error"] < 1e-6 for stage in plan.stages)


def test_no_output_is_noted_and_no_error_is_claimed() -> None:
    _, plan = convert(Wrap(lambda y: None), depth_multiplier=None, budget=0.7)
    assert "not differentiable" in plan.notes[0]
    assert plan.stages == []


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = conv(3, 5), nn.BatchNorm2d(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(input=self.conv(input=x))


def test_layers_called_by_keyword() -> None:
    _, plan = convert(Named().eval(), depth_multiplier=5)
    assert [stage["name"] for stage in plan.stages] == ["closed form", "sequential", "batch norm statistics"]
    assert plan.stages[-1]["output_error"] < 1e-6


class Halved(nn.Module):
    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(0.5) if self.inplace else x * 0.5


@pytest.mark.parametrize("budget", [None, 0.7])
def test_a_model_that_changes_its_input_leaves_the_images_alone(budget: float | None) -> None:
    x = X.clone()
    model = nn.Sequential(Halved(inplace=True), *net())
    arguments = {} if budget is None else {"depth_multiplier": None, "budget": budget}
    new, _ = convert(model, x, **arguments)
    assert torch.equal(x, X)
    plain, _ = convert(nn.Sequential(Halved(inplace=False), *model[1:]), x, **arguments)
    assert all(torch.equal(a, b) for a, b in zip(new.parameters(), plain.parameters(), strict=True))


def test_a_layer_whose_gradient_does_not_come_back_is_weighed_by_its_norm() -> None:
    class Opaque(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x + 0

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> None:
            return None

    _, plan = convert(Wrap(Opaque.apply), depth_multiplier=None, budget=0.7)
    assert "not differentiable" in plan.notes[0]
    assert plan.converted
