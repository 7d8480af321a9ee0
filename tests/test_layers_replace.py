"""Other people's networks with our layers in place, and back: the same modules, parameters and names."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from trainable import always, assert_as_exact, gradients, images, network, ours, stage

import sepconv
from sepconv.layers import DepthwiseConv2d, PointwiseConv2d, SeparableConv2d
from sepconv.layers.training import NormalConv2d
from sepconv.ops import stages
from sepconv.ops.pending import Pending

__all__ = ["always"]


def test_convolutions_change_their_class_and_nothing_else() -> None:
    model = network()
    conv, parameters, names = model[0], [*model.parameters()], [*model.state_dict()]
    made = sepconv.replace_layers(model)
    assert made.replaced == {"0": "normal", "3": "pointwise", "6": "depthwise", "9": "pointwise"}
    assert made.left == {}
    assert [type(model[i]) for i in (0, 3, 6, 9)] == [NormalConv2d, PointwiseConv2d, DepthwiseConv2d, PointwiseConv2d]
    assert model[0] is conv
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert [*model.state_dict()] == names
    assert model[6].depth_multiplier == 1


def test_the_way_back() -> None:
    model = network()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    made = sepconv.replace_layers(model)
    assert made.undo() is model
    assert {type(module) for module in model.modules()} == {type(module) for module in network().modules()}
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before
    sepconv.restore_layers(model)  # twice is once


def test_layers_of_ours_are_put_back_as_they_were() -> None:
    model = nn.Sequential(SeparableConv2d(4, 4, 3, norm="batch"), DepthwiseConv2d(4, 3))
    waited = [getattr(module, "waits", None) for module in model.modules()]
    sepconv.replace_layers(model)
    assert all(module.waits for module in model.modules() if hasattr(module, "waits"))
    sepconv.restore_layers(model)
    assert [getattr(module, "waits", None) for module in model.modules()] == waited
    assert type(model[1]) is DepthwiseConv2d


class _Same(nn.Conv2d):
    """A convolution of somebody's own."""


def test_what_is_left_and_why() -> None:
    model = nn.ModuleDict(
        {
            "signal": nn.Conv1d(4, 4, 3, groups=4),
            "own": _Same(4, 4, 3),
            "reflected": nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
            "upwards": nn.ConvTranspose2d(4, 4, 2),
            "synced": nn.SyncBatchNorm(4),
            "instance": nn.InstanceNorm2d(4),
            "chosen": nn.Conv2d(4, 4, 1),
            "parametrized": nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1)),
            "ours": nn.Conv2d(4, 8, 3, groups=2),
        }
    )
    made = sepconv.replace_layers(model, filter=lambda module, name: name != "chosen")
    assert made.replaced == {"ours": "normal"}
    assert made.left == {
        "signal": "a Conv1d may do something else than nn.Conv2d",
        "own": "a _Same may do something else than nn.Conv2d",
        "reflected": "padding_mode is 'reflect'",
        "upwards": "a ConvTranspose2d may do something else than nn.Conv2d",
        "synced": "a SyncBatchNorm computes by itself",
        "instance": "a InstanceNorm2d computes by itself",
        "chosen": "the filter left it",
        "parametrized": "a ParametrizedConv2d may do something else than nn.Conv2d",
    }
    assert "reflected: left (padding_mode is 'reflect')" in str(made)


def test_wrong_arguments() -> None:
    with pytest.raises(TypeError, match=r"replace_layers: model must be a torch.nn.Module, got list"):
        sepconv.replace_layers([])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"restore_layers: model must be a torch.nn.Module, got Tensor"):
        sepconv.restore_layers(torch.ones(1))  # type: ignore[arg-type]


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_replaced_too_and_can_be_restored(way: str) -> None:
    model, _ = ours(network())
    if way == "torch.save":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    else:
        other = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    x = images()
    for name, grad in gradients(model, x).items():
        torch.testing.assert_close(gradients(copy.deepcopy(other), x)[name], grad, rtol=0, atol=0)
    sepconv.restore_layers(other)
    assert type(other[0]) is nn.Conv2d
    assert not other._forward_hooks


@pytest.mark.usefixtures("always")
def test_shared_layers_and_tied_weights() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
            self.shared = nn.Conv2d(6, 6, 3, padding=1, groups=6)
            self.tied = nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False)
            self.tied.weight = self.shared.weight
            self.norms = nn.ModuleList(nn.BatchNorm2d(6) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.norm(self.stem(x)))
            for conv, norm in zip((self.shared, self.shared, self.tied), self.norms, strict=True):
                x = F.relu6(norm(conv(x)), inplace=True)
            return x

    assert_as_exact(Tied(), images(), gradients)


@pytest.mark.usefixtures("always")
def test_what_leaves_a_network_is_ordinary() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(*stage(3, 4))

        def forward(self, x: Tensor) -> dict[str, Any]:
            y = self.body(x)
            return {"y": y, "more": [y, self.body[0](x)]}

    model = Two()
    sepconv.replace_layers(model.body)
    assert type(model.body(images())) is Tensor
    sepconv.replace_layers(model)  # as a whole: the part's own end is none now
    assert type(model.body(images())) is not Tensor
    found = model(images())
    assert [type(t) for t in (found["y"], *found["more"])] == [Tensor] * 3


def _pixels() -> Tensor:
    return torch.randn(2, 4, 1, 1)


def _pointwise(inputs: int, outputs: int) -> nn.Module:
    layer = PointwiseConv2d(inputs, outputs)
    layer.waits = True
    return layer.to(memory_format=torch.channels_last)


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def _reasons(model: nn.Module, x: Tensor) -> set[str]:
    return {reason for choice in sepconv.explain(model, x) for reason in choice.reasons.values()}


def test_norms_over_channels_are_left_with_a_reason() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4), nn.LayerNorm([4, 5, 5]))
    left = sepconv.replace_layers(model).left
    assert left == {"1": "a GroupNorm computes by itself", "2": "a LayerNorm computes by itself"}


@pytest.mark.usefixtures("always")
def test_normal_convolutions_keep_what_they_read() -> None:
    model, _ = ours(nn.Sequential(*stage(3, 8, 3), *stage(8, 8, 3)))
    with sepconv.ops.explain.record() as choices:
        gradients(model, images())
    [kept] = [choice for choice in choices if choice.op == "normal_stage_input"]
    assert (kept.kernel, list(kept.reasons)) == ("kept", ["computed again"])
    assert [choice.op for choice in choices].count("finish_stage") == 2  # there, and at the end


@pytest.mark.usefixtures("always")
def test_plain_paths_say_why() -> None:
    model, _ = ours(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    conv, x = model[0], images()
    assert _reasons(model, x) == set()
    assert _reasons(model, x.contiguous()) == {"stages are for channels_last images on the CPU"}
    with torch.autocast("cpu", torch.float16):
        assert _reasons(model, x) == {"autocast is to torch.float16"}
    with _Mode():
        assert _reasons(model, x) == {"a mode wants to see each operator"}
    handle = conv.register_forward_hook(lambda *given: None)
    assert _reasons(model, x) == {"a hook watches the layer"}
    handle.remove()
    conv.weight.requires_grad_(False)
    assert _reasons(model, x) == {"the weight is frozen or not a plain tensor"}
    conv.weight.requires_grad_(True)
    assert "stages have numbers of float32, or of bfloat16 by autocast, got torch.float64" in _reasons(
        copy.deepcopy(model).double(), x.double()
    )
    with pytest.raises(RuntimeError, match="expected input"):
        model(torch.randn(2, 5, 7, 7).contiguous(memory_format=torch.channels_last))
    assert "a single pixel is no work that would pay" in _reasons(nn.Sequential(_pointwise(4, 4)), _pixels())


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_a_norm_a_convolution_waits_once(dtype: torch.dtype) -> None:
    """Nobody asked for its statistics: from then on it is computed at once, which is the same."""
    parts = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4), nn.GELU(), nn.Conv2d(4, 4, 1)]
    model, _ = ours(nn.Sequential(*parts, nn.BatchNorm2d(4, momentum=None), nn.ReLU()))
    x, reason = images(), "no norm stands before or behind it: there is no pass to save"

    def found() -> dict[str, Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            return {name: t.clone() for name, t in gradients(model, x).items()}

    with sepconv.ops.explain.record() as first:
        before = found()
    assert [model[i].asked for i in (0, 2, 4)] == [False, False, True]
    assert reason not in {told for choice in first for told in choice.reasons.values()}
    with sepconv.ops.explain.record() as second:
        after = found()
    said = [choice.op for choice in second if choice.reasons.get("halide") == reason]
    assert said == ["normal_stage", "depthwise_stage"]
    assert all(torch.equal(after[name], grad) for name, grad in before.items() if "running" not in name)
    sepconv.replace_layers(model)  # begins anew
    assert [model[i].asked for i in (0, 2, 4)] == [None] * 3
    sepconv.restore_layers(model)
    assert not any("asked" in vars(module) for module in model.modules())


@pytest.mark.usefixtures("always")
def test_looking_at_a_result_makes_no_norm_forgotten() -> None:
    model, _ = ours(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)))
    gradients(model, images())
    model[0](images()).sum()
    assert model[0].asked is True
    assert "normal_stage" in [choice.op for choice in sepconv.explain(model, images())]


@pytest.mark.usefixtures("always")
def test_images_of_a_loader_become_channels_last_each_time() -> None:
    """The weights ask for it, and what comes behind waits for channels_last images alone."""
    model, _ = ours(nn.Sequential(nn.Conv2d(3, 6, 3, groups=3), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4)))
    model.to(memory_format=torch.channels_last)
    for _ in range(3):
        with sepconv.ops.explain.record() as seen:
            gradients(model, images().contiguous())
        assert "pointwise_stage" in [choice.op for choice in seen]


def test_where_no_kernel_pays_pytorchs_modules_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "unpaid", lambda *case, **options: "it would not")
    model, _ = ours(network())
    with sepconv.ops.explain.record() as choices:
        gradients(model, images())
    said = [choice for choice in choices if choice.op.endswith("_stage")]
    assert [choice.op for choice in said] == ["normal_stage", "pointwise_stage", "depthwise_stage", "pointwise_stage"]
    assert {(choice.kernel, choice.reasons["halide"]) for choice in said} == {("torch", "it would not")}
    assert type(model[0](images())) is torch.Tensor  # nothing waits


@pytest.mark.usefixtures("always")
def test_sync_batch_norm_and_other_norms() -> None:
    for norm in (
        nn.SyncBatchNorm(12),
        nn.GroupNorm(3, 12),
        nn.InstanceNorm2d(12, affine=True),
        nn.LocalResponseNorm(2),
    ):
        assert_as_exact(network(nn.Sequential(nn.Conv2d(12, 12, 1), norm)), images(), gradients)


@pytest.mark.usefixtures("always")
def test_functional_transforms() -> None:
    model, _ = ours(network())
    plain = sepconv.restore_layers(copy.deepcopy(model))
    x = images()

    def loss(parameters: dict[str, Tensor], model: nn.Module, x: Tensor) -> Tensor:
        return torch.func.functional_call(model.eval(), parameters, (x,)).square().sum()

    found, expected = (torch.func.grad(loss)(dict(m.named_parameters()), m, x) for m in (model, plain))
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-3, atol=1e-3 * grad.abs().max().item())


@pytest.mark.usefixtures("always")
def test_compiled_networks() -> None:
    model, _ = ours(network())
    plain = sepconv.restore_layers(copy.deepcopy(model))
    x = images()
    expected, found = gradients(plain, x), gradients(torch.compile(model, backend="aot_eager"), x)
    for name, grad in expected.items():
        torch.testing.assert_close(found[f"_orig_mod.{name}" if name != "image" else name], grad, rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("last", ["convolution", "norm", "activation"])
@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # PyTorch's compiler looks at it
def test_parts_compiled_alone_take_pending_tensors(last: str, fullgraph: bool) -> None:
    """In one graph that is compiled once, with what is still to be done for the tensor in it."""
    parts = nn.Sequential(*stage(3, 8, 3), *stage(8, 16, 3))
    body = parts[: {"convolution": 4, "norm": 5, "activation": 6}[last]]
    head = nn.Sequential(nn.Conv2d(16, 5, 1), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    plain = nn.Sequential(body, head)
    model, _ = ours(plain)
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    sepconv.restore_layers(model[1])
    model[1] = torch.compile(model[1], backend=backend, fullgraph=fullgraph)
    model[0].register_forward_hook(lambda module, args, y: seen.append(type(y)))
    seen: list[type] = []
    for _ in range(3):
        x = images()
        found = {name.replace("_orig_mod.", ""): grad for name, grad in gradients(model, x).items()}
        for name, grad in gradients(plain, x).items():
            torch.testing.assert_close(found[name], grad, rtol=1e-3, atol=1e-3)
    assert seen == [Pending] * 3
    assert len(graphs) == 1


@pytest.mark.usefixtures("always")
def test_export_and_script_see_pytorchs_operators() -> None:
    model, _ = ours(network().eval())
    x = images()
    program = torch.export.export(model, (x,))
    assert "conv2d" in str(program.graph)
    torch.testing.assert_close(program.module()(x), model(x).detach(), rtol=1e-4, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        traced = torch.jit.trace(model, x, check_trace=False)
    assert "conv2d" in str(traced.inlined_graph) or "_convolution" in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x), model(x), rtol=1e-4, atol=1e-5)
