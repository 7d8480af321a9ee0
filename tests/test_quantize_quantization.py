"""Quantized networks: where integers stand, how close the answers are, what is left or refused, that it trains."""

from __future__ import annotations

import copy
import logging
import pickle
import re
from typing import Any

import pytest
import torch
from quantizable import Blocks, images, scaled_by_channel, with_statistics
from torch import Tensor, fx, nn

from sepconv.leaves import Inputs
from sepconv.ops.quantized import FAKE_QUANTIZE
from sepconv.quantize import QuantizationPlan, quantize
from sepconv.quantize.equalize import equalize, observe
from sepconv.quantize.fake import FakeQuantize
from sepconv.quantize.joints import find_joints
from sepconv.quantize.quantization import prepared

VALUES = (
    "x",
    "stem_2_hardtanh",
    "expand_2_hardtanh",
    "depthwise_2_hardtanh",
    "add",
    "separable_conv2d",
    "relu",
    "mean",
)


def relative_error(given: Tensor, wanted: Tensor) -> float:
    return float((given - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum())


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return with_statistics(Blocks())


@pytest.fixture(scope="module")
def found(model: Any) -> tuple[fx.GraphModule, QuantizationPlan]:
    return quantize(model, images())


@torch.no_grad()
def test_answers_stay_and_the_model_too(model: Any, found: Any) -> None:
    quantized, plan = found
    before = copy.deepcopy(model.state_dict())
    unseen = images(seed=2)
    assert 0 < relative_error(quantized(unseen), model(unseen)) < 0.01
    assert plan.left == []
    assert plan.error < 0.01
    assert (plan.images, plan.held_out) == (75, 5)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not quantized.training


@torch.no_grad()
@pytest.mark.parametrize("shape", [(1, 3, 16, 16), (7, 3, 16, 16), (2, 3, 24, 20)])
def test_batches_and_images_of_other_sizes(model: Any, found: Any, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).cumsum(2).cumsum(3) / 8
    assert relative_error(found[0](x).flatten()[:, None], model(x).flatten()[:, None]) < 0.05


def test_weights_are_on_their_steps(found: Any) -> None:
    quantized = found[0]
    quantizers = {name: m for name, m in quantized.named_modules() if name.endswith("weight_quantizer")}
    assert len(quantizers) == 7
    for name, quantizer in quantizers.items():
        weight = quantized.get_parameter(name.removesuffix("_quantizer"))
        assert quantizer.scale.shape == (len(weight),)
        steps = weight / quantizer.scale.view(-1, *[1] * (weight.dim() - 1))
        assert (steps - steps.round()).abs().max() < 1e-4
        assert steps.abs().max() < 127.5


def test_biases_are_whole_numbers_of_the_units_of_their_sums(found: Any) -> None:
    """Else kernels and runtimes, whose biases are such numbers, would answer something else."""
    quantized, modules = found[0], dict(found[0].named_modules())
    calls = [node for node in quantized.graph.nodes if "conv2d" in str(node.target) and node.op == "call_function"]
    assert len(calls) == 6
    for call in calls:
        x, weight, bias = call.args[:3]
        unit = modules[x.target].scale.double() * modules[weight.target].scale.double()
        steps = quantized.get_parameter(bias.target).detach().double() / unit
        assert (steps - steps.round()).abs().max() < 1e-6 * steps.abs().max()  # of float32
        assert steps.abs().max() > 1


def test_integers_stand_between_layers_and_nowhere_else(found: Any) -> None:
    """The input, each activation, the sum with the shortcut, the mean; not what is added, not the answer."""
    quantized = found[0]
    values = [name for name, m in quantized.named_modules() if isinstance(m, FakeQuantize) and "weight" not in name]
    assert values == [f"quantizers.{name}" for name in VALUES]
    assert all(user.op == "output" for node in quantized.graph.nodes if str(node) == "linear" for user in node.users)


@torch.no_grad()
def test_channels_that_differ_by_thousands_cost_nothing(model: Any, found: Any) -> None:
    scaled = scaled_by_channel(copy.deepcopy(model))
    unseen = images(seed=2)
    assert torch.equal(scaled(unseen), model(unseen))
    quantized, plan = quantize(scaled, images())
    assert relative_error(quantized(unseen), model(unseen)) < 0.01
    assert plan.left == []


@torch.no_grad()
def test_channels_that_differ_behind_a_relu_are_equalized() -> None:
    torch.manual_seed(0)
    convs = [nn.Conv2d(3, 16, 3, 1, 1), nn.Conv2d(16, 16, 3, 1, 1, groups=16), nn.Conv2d(16, 8, 1)]
    model: Any = nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), convs[2]).eval()
    factor = torch.exp2(torch.randint(-6, 7, (16,)).float())
    for before, after in ((0, 1), (1, 2)):
        convs[before].weight.data *= factor.view(-1, 1, 1, 1)
        convs[before].bias.data *= factor  # type: ignore[union-attr]
        convs[after].weight.data /= factor.view(-1, 1, 1, 1) if after == 1 else factor.view(1, -1, 1, 1)
    unseen = images(seed=2)
    errors = []
    for equalized in (True, False):
        quantized, plan = quantize(model, images(), equalize=equalized, force=True)
        errors.append(relative_error(quantized(unseen), model(unseen)))
        assert [row.equalized for row in plan.layers] == [equalized, equalized, False]
    assert errors[0] < 0.002
    assert errors[0] < errors[1] / 10


class Shortcuts(nn.Module):
    """Sums of sums, with a ReLU between."""

    def __init__(self, last: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 3, 1, 1), nn.Conv2d(16, 16, 1)
        self.head, self.last = nn.Conv2d(16, 8, 1), last or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = torch.relu(x + self.second(x))
        x = x + self.last(self.third(x))
        result: Tensor = self.head(x)
        return result


def scaled_stream(model: Shortcuts) -> Shortcuts:
    """The same function with channels of the sums that differ a thousandfold."""
    factor = torch.exp2(torch.randint(-5, 6, (16,), generator=torch.Generator().manual_seed(0)).float())
    for conv in (model.first, model.second, model.third):
        conv.weight.data *= factor.view(-1, 1, 1, 1)
        conv.bias.data *= factor  # type: ignore[union-attr]
    for conv in (model.second, model.third, model.head):
        conv.weight.data /= factor.view(1, -1, 1, 1)
    return model


@torch.no_grad()
def test_channels_of_sums_are_equalized() -> None:
    torch.manual_seed(0)
    model = Shortcuts().eval()
    wanted = model(images(seed=2))
    scaled_stream(model)
    assert torch.allclose(model(images(seed=2)), wanted, atol=1e-4)
    quantized, plan = quantize(model, images())
    assert [row.equalized for row in plan.layers] == [True] * 3 + [False]
    assert plan.left == []
    assert relative_error(quantized(images(seed=2)), wanted) < 0.005
    assert quantize(model, images(), equalize=False, force=True)[1].left == ["second", "third", "head"]


@torch.no_grad()
def test_no_factor_goes_through_what_bends() -> None:
    """One SiLU on the way, and the layers of all sums that it belongs to keep their channels."""
    torch.manual_seed(0)
    _, plan = quantize(scaled_stream(Shortcuts(nn.SiLU())).eval(), images(), force=True)
    assert [row.equalized for row in plan.layers] == [False] * 4


@torch.no_grad()
def test_factors_leave_room_for_peaks_in_front_of_a_mean() -> None:
    """A ReLU6 cuts pixels, not the mean behind it: what the factors go by is the larger of both."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 1), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)
    ).eval()
    model[0].weight.data *= torch.logspace(-1, 0, 16).view(-1, 1, 1, 1)
    x = torch.randn(80, 3, 16, 16, generator=torch.Generator().manual_seed(0)).pow(3)  # rare large pixels
    base = prepared(copy.deepcopy(model), Inputs.of(x[:2]))
    joints = find_joints(base)
    assert equalize(base, joints, observe(base, joints, [Inputs.of(x)])) == ["0"]
    assert relative_error(base(x), model(x)) < 1e-10


def test_a_recorded_graph_is_what_compile_reads(found: Any) -> None:
    graph = torch.export.export(found[0], (images(2),)).graph
    marks = [node for node in graph.nodes if node.target is FAKE_QUANTIZE]
    assert sorted(node.args[3] for node in marks) == [-1] * len(VALUES) + [0] * 7


def test_it_trains_is_copied_and_pickled(found: Any) -> None:
    copied = copy.deepcopy(found[0]).train()
    assert copied.training
    before = copy.deepcopy(copied.state_dict())
    copied(images(8)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in copied.parameters())
    torch.optim.SGD(copied.parameters(), 0.1).step()
    changed = {name for name, value in copied.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name, _ in copied.named_parameters()}
    again = pickle.loads(pickle.dumps(copied.eval()))
    assert torch.equal(again(images(8)), copied(images(8)))


def test_what_is_asked_to_stay_stays(model: Any) -> None:
    quantized, plan = quantize(model, images(), skip=("stem.0", "classifier"))
    assert plan.left == ["stem.0", "classifier"]
    assert "quantizers.x" not in dict(quantized.named_modules())
    assert [row.reason for row in plan.layers if not row.integers] == ["skipped", "skipped"]
    assert "skipped" in str(plan)
    with pytest.raises(ValueError, match="quantize: skip names 'body'"):
        quantize(model, images(), skip=("body",))


@torch.no_grad()
def test_a_layer_of_rare_large_inputs_is_left() -> None:
    """Steps that reach the few leave nothing of the many, and the many count after the next norm."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 6, 1)).eval()
    model[0].weight.data[0] *= 1e4
    model[1].weight.data[:, 0] = 0
    quantized, plan = quantize(model, images(), equalize=False)
    assert plan.left == ["1"]
    assert "its integers would add" in plan.layers[1].reason
    assert relative_error(quantized(images(seed=2)), model(images(seed=2))) < 0.02


@pytest.mark.parametrize("kind", ["one", "constant", "dark"])
@torch.no_grad()
def test_few_and_constant_images(model: Any, kind: str) -> None:
    x = {"one": images(1), "constant": torch.full((4, 3, 16, 16), 0.5), "dark": torch.zeros(4, 3, 16, 16)}[kind]
    quantized, plan = quantize(model, x, force=True)
    assert quantized(images(3)).isfinite().all()
    assert plan.held_out == 0
    wanted = model(x)
    assert (quantized(x) - wanted).square().mean() < 0.01 * wanted.square().mean()


def test_loaders_and_calls_by_name_and_several_outputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)

        def forward(self, left: Tensor, right: Tensor) -> dict[str, Tensor]:
            found = self.conv(left) + self.conv(right)
            return {"sum": found, "head": self.head(found)}

    torch.manual_seed(0)
    model = Two().eval()
    batches = [{"left": images(8, seed=i), "right": images(8, seed=9 + i)} for i in range(2)]
    quantized, plan = quantize(model, batches)
    with torch.no_grad():
        answer = quantized(**batches[0])
    assert {name: tuple(x.shape) for name, x in answer.items()} == {"sum": (8, 4, 14, 14), "head": (8, 2, 14, 14)}
    assert [row.name for row in plan.layers] == ["conv", "head"]
    assert plan.error < 0.01


class Random(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


class Values(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (nn.Identity, {"ranges": "widest"}, "quantize: ranges must be one of mse, minmax, got 'widest'"),
        (nn.Identity, {"rounding": "up"}, "quantize: rounding must be one of moments, nearest, got 'up'"),
        (nn.Identity, {"calibration": torch.full((2, 3, 8, 8), torch.nan)}, "quantize: calibration images hold NaN"),
        (nn.Identity, {"calibration": []}, "quantize: calibration holds no images"),
        (Random, {}, "quantize: the model answers differently from its captured graph"),
        (Values, {}, "quantize: PyTorch cannot export Sequential"),
    ],
)
def test_refusals(change: type[nn.Module], arguments: dict[str, Any], message: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), change()).eval()
    with pytest.raises(ValueError, match=message):
        quantize(model, **{"calibration": images(4), **arguments})


def test_what_cannot_be_quantized_is_refused(found: Any) -> None:
    with pytest.raises(ValueError, match="quantize: the model is quantized already"):
        quantize(found[0], images(2))
    with pytest.raises(TypeError, match=r"quantize: model must be a torch\.nn\.Module, got int"):
        quantize(3, images(2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="quantize: the model has no convolution or linear layer"):
        quantize(nn.Sequential(nn.ReLU()), images(2))
    broken = nn.Conv2d(3, 4, 1)
    broken.weight.data[0] = torch.nan
    with pytest.raises(ValueError, match="quantize: weight holds NaN or infinity"):
        quantize(broken, images(2))


def test_a_network_that_moves_too_far_is_refused_with_the_numbers() -> None:

    class Steep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return (200 * self.conv(x)).sin()

    torch.manual_seed(0)
    with pytest.raises(ValueError, match=r"the outputs would move by .* of their variance") as refused:
        quantize(Steep().eval(), images(4))
    # One line, with what to do in Python and on the command line.
    said = str(refused.value)
    assert re.search(r"worst layers in float32 \(skip, on the command line --skip NAME\): conv \([\d.e-]+\); or", said)
    assert said.endswith("or take it as it is (force=True, --force)")
    assert "\n" not in said
    _, plan = quantize(Steep().eval(), images(4), force=True)
    assert plan.error > 0.1


def test_what_pytorch_finds_hard_is_not_written_to_the_user(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    export, logger = torch.export.export, logging.getLogger("torch.fx.experimental.symbolic_shapes")

    def complaining(*args: Any, **options: Any) -> Any:
        logger.warning("Failed to reduce inequalities")
        return export(*args, **options)

    monkeypatch.setattr(torch.export, "export", complaining)
    with caplog.at_level(logging.WARNING):
        quantize(nn.Sequential(nn.Conv2d(3, 4, 1)).eval(), torch.randn(4, 3, 5, 7))
    assert not caplog.records
    logger.warning("as before")
    assert caplog.records
