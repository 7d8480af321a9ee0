"""Counting leaves a model as it was, computes nothing, and names the layer that it cannot count."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sepconv
from sepconv.cost import count, counter
from sepconv.leaves import Inputs
from sepconv.models import MobileNetV1


class Restless(nn.Module):
    """Keeps tensors outside its buffers and changes itself while it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.scale = torch.full((4, 1, 1), 2.0)
        self.last: Tensor | None = None
        self.calls = 0
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.steps += 1
        self.last = self.norm(self.conv(x)) * self.scale.to(x.device) + torch.arange(6.0)
        self.register_buffer("late", torch.zeros(1))
        return self.last


def test_the_model_is_left_as_it_was() -> None:
    model = nn.Sequential(Restless(), nn.Dropout()).train()
    model[0].norm.eval()
    model(torch.randn(2, 3, 8, 8))
    seen = []
    handle = model[0].conv.register_forward_hook(lambda *args: seen.append(1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    identities = [id(t) for t in (*model.parameters(), *model.buffers())]
    last, hooks = model[0].last, dict(model[0].conv._forward_hooks)
    for shape in ((3, 8, 8), (5, 8, 8)):
        if shape[0] == 3:
            assert count(model, shape).macs == 4 * 27 * 36
        else:
            with pytest.raises(ValueError, match=r"layer '0\.conv'"):
                count(model, shape)
        assert [module.training for module in model.modules()] == [True, True, True, False, True]
        assert [id(t) for t in (*model.parameters(), *model.buffers())] == identities
        assert model[0].last is last
        assert model[0].calls == 1
        assert model[0].conv._forward_hooks == hooks
        assert "late" in model[0]._buffers
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert seen == [1]
    handle.remove()


def test_nothing_is_computed_or_copied() -> None:
    """Fourteen gigabytes of weights, which do not exist: a copy or a product could not be made."""
    model = nn.Conv2d(20_000, 20_000, 3, bias=False, device="meta")
    assert count(model, (20_000, 512, 512)).macs == 20_000**2 * 9 * 510**2


def test_inference_mode_and_gradients_change_nothing() -> None:
    model = MobileNetV1(0.25, num_classes=10)
    expected = count(model, (3, 32, 32))
    with torch.inference_mode():
        assert count(model, (3, 32, 32)) == expected
    assert count(model.requires_grad_(False), (3, 32, 32)) == expected
    assert count(model.half().to(memory_format=torch.channels_last), (3, 32, 32)).macs == expected.macs


def test_a_compiled_model_is_counted_without_compiling() -> None:
    def refuse(*args: Any) -> Any:
        raise AssertionError("compiled")

    model = torch.compile(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), backend=refuse)
    assert count(model, (3, 5, 5)).macs == 4 * 27 * 9


class Bad(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.first(x))


class Catches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow, self.last = nn.Linear(99, 1), nn.Linear(8, 8), nn.Linear(7, 1)

    def forward(self, x: Tensor) -> Tensor:
        try:
            return self.wide(x)
        except RuntimeError:
            return self.last(self.narrow(x))


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (
            nn.Conv2d(3, 4, 3),
            (3, 0, 4),
            r"count: input_shape must be positive integers without the batch, got \(3, 0, 4\)",
        ),
        (nn.Conv2d(3, 4, 3), (3, 4.0, 4), r"count: input_shape must be positive integers"),
        (nn.Conv2d(3, 4, 3), 224, r"count: input_shape must be positive integers without the batch, got 224"),
        (
            nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3))),
            (1, 3, 8, 8),
            r"count: layer '0.0' \(Conv2d\) fails without data on an input of shape \(1, 1, 3, 8, 8\): .*"
            r"\(input_shape = \(1, 3, 8, 8\), to be given without the batch\)",
        ),
        (
            nn.Sequential(sepconv.SeparableConv2d(3, 4, 3)),
            (5, 8, 8),
            r"count: layer '0' \(SeparableConv2d\) fails .* \(1, 5, 8, 8\): separable_conv2d: depthwise_weight",
        ),
        (Bad(lambda x: x if x.sum() > 0 else -x), (3, 4, 4), r"count: Bad fails without data on an input .* meta"),
        (Catches(), (8,), r"count: layer 'last' \(Linear\) fails without data on an input of shape \(1, 8\)"),
        (nn.LazyConv2d(3, 3), (3, 4, 4), r"count: 'weight' of a lazy layer has no shape yet; run the model once"),
    ],
)
def test_errors_name_the_layer(model: nn.Module, shape: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        count(model, shape)


def test_code_that_looks_at_values_is_counted_with_those_of_an_example() -> None:
    model = Bad(lambda x: x if x.sum() > 0 else -x)
    model.register_buffer("calls", torch.zeros(()))
    model.register_forward_pre_hook(lambda module, _: [module.calls.add_(1), None][1])
    example, weight = torch.randn(2, 3, 4, 4), model.first.weight.clone()
    kept = example.clone()
    found = count(model, Inputs((example,)))
    assert found.layers == count(Bad(lambda x: x), (3, 4, 4)).layers
    assert torch.equal(model.first.weight, weight)
    assert torch.equal(example, kept)
    assert model.calls == 0
    with pytest.raises(ValueError, match=r"count: layer 'first' \(Conv2d\) fails on an input of shape \(1, 4, 4, 4\)"):
        count(model, Inputs((torch.randn(1, 4, 4, 4),)))


def test_errors_of_type() -> None:
    with pytest.raises(TypeError, match=r"count: model must be a torch.nn.Module, got function"):
        count(lambda x: x, (3, 4, 4))  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_torchscript_is_refused() -> None:
    with pytest.raises(TypeError, match="count: a TorchScript module cannot be observed"):
        count(nn.Sequential(torch.jit.script(nn.Linear(2, 2))), (2,))


def test_an_operation_of_ours_without_a_rule_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(counter.RULES, torch.ops.sepconv.separable_conv.default)
    with pytest.raises(ValueError, match=r"no rule for the operation sepconv\.separable_conv"):
        count(sepconv.SeparableConv2d(3, 4, 3), (3, 5, 5))
