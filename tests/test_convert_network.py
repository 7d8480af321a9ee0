from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sepconv import SeparableConv1d, SeparableConv2d, SeparableConv3d
from sepconv.convert import Plan, closed_form, convert, network, options
from sepconv.convert.graph import find_sites, record
from sepconv.convert.options import latencies


def conv(channels: int, outputs: int, size: int = 3, **arguments: Any) -> nn.Conv2d:
    return nn.Conv2d(channels, outputs, size, **{"padding": size // 2, **arguments})


class Residual(nn.Module):
    def __init__(self, channels: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv(channels, outputs, stride=stride, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = conv(outputs, outputs, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Conv2d(channels, outputs, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu_(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class Shared(nn.Module):
    """One convolution registered under two names and called twice, on images of two sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 6)
        self.first = conv(6, 6)
        self.again = nn.ModuleDict({"same": self.first})
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(torch.relu(self.stem(x))))
        x = torch.relu(self.again["same"](x[:, :, ::2, ::2]))
        return self.head(x.mean((2, 3)))


STAYED = "the budget is better spent on other layers"


def plain() -> nn.Module:
    return nn.Sequential(
        conv(3, 8, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        conv(8, 12),
        nn.ReLU(),
        nn.BatchNorm2d(12),
        conv(12, 12, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 5),
    )


def resnet() -> nn.Module:
    blocks = nn.Sequential(Residual(8, 8, 1), Residual(8, 12, 2))
    return nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5))


def unusual() -> nn.Module:
    return nn.Sequential(
        conv(3, 6, 5, padding_mode="reflect"),
        nn.SiLU(),
        conv(6, 7, dilation=2, padding="same"),
        nn.Tanh(),
        nn.Sequential(nn.Sequential(conv(7, 5, padding=0, stride=(2, 1), padding_mode="circular"))),
        nn.Flatten(2),
    )


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "plain": plain,
    "resnet": resnet,
    "shared": Shared,
    "unusual": unusual,
}


def images(count: int = 40, size: int = 13, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(count, 3, size, size, dtype=torch.float64, generator=generator)
    return (nn.functional.avg_pool2d(noise, 3, 1, 1) * 2).to(dtype)


def trained(make: Callable[[], nn.Module]) -> nn.Module:
    """A network whose batch norms have seen images, in evaluation mode."""
    model = make().double()
    for _ in range(20):
        model(images())
    return model.eval()


@pytest.mark.parametrize("method", ["svd", "least_squares", "sequential"])
@pytest.mark.parametrize("name", NETWORKS)
def test_full_rank_changes_nothing(name: str, method: str) -> None:
    model = trained(NETWORKS[name])
    new, plan = convert(model, images(), method=method, depth_multiplier=25)
    x = images(9, 17)
    torch.testing.assert_close(new(x), model(x), rtol=1e-9, atol=1e-10)
    assert not any(type(m) is nn.Conv2d and m.kernel_size != (1, 1) and m.groups == 1 for m in new.modules())
    assert all(row.depth_multiplier == min(row.out_channels, row.kernel_size[0] ** 2) for row in plan.converted)
    assert all(stage["output_error"] < 1e-15 for stage in plan.stages)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_original_is_untouched(name: str) -> None:
    model = NETWORKS[name]().double().train()
    state = copy.deepcopy(model.state_dict())
    new, _ = convert(model, images(), depth_multiplier=1)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(m.training for m in [*model.modules(), *new.modules()])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in [*model.modules(), *new.modules()])
    assert not {id(p) for p in model.parameters()} & {id(p) for p in new.parameters()}
    assert all(p.requires_grad for p in [*model.parameters(), *new.parameters()])


def test_modes_of_single_modules_are_kept() -> None:
    model = plain().double().train()
    model[1].eval()
    new, _ = convert(model, images(), depth_multiplier=1)
    assert [m.training for m in new.children()] == [m.training for m in model.children()]
    assert new[0].depthwise.training
    frozen = plain().double().eval().requires_grad_(False)
    new, _ = convert(frozen, images(), depth_multiplier=1)
    assert not any(p.requires_grad for p in new.parameters())
    assert not any(m.training for m in new.modules())


def test_a_shared_module_stays_shared() -> None:
    new, plan = convert(trained(Shared), images(), depth_multiplier=2)
    assert new.first is new.again["same"]
    assert isinstance(new.first, SeparableConv2d)
    assert [row.name for row in plan.layers] == ["stem", "first"]
    assert plan.layers[1].macs_before == 6 * 6 * 9 * (13 * 13 + 7 * 7)


def test_progress_counts_every_fit() -> None:
    seen: list[tuple[int, int]] = []
    _, plan = convert(trained(plain), images(40), budget=1 / 2, on_progress=lambda done, of: seen.append((done, of)))
    assert [done for done, _ in seen] == list(range(1, len(seen) + 1))
    assert len({of for _, of in seen}) == 1
    stayed = sum(not row.depth_multiplier and row.reason == STAYED for row in plan.layers)
    assert seen[-1][1] == len(seen) + stayed
    seen.clear()
    _, plan = convert(trained(plain), images(40), depth_multiplier=1, on_progress=lambda *step: seen.append(step))
    assert seen[-1] == (len(plan.converted), len(plan.converted))


def test_closed_form_has_the_plans_ranks_and_its_error() -> None:
    model = trained(resnet).requires_grad_(False)
    x = images(100)
    _, plan = convert(model, x, budget=1 / 2, reestimate_bn=False)
    simple = closed_form(model, plan, x[:2])
    ranks = {name: m.depthwise.depth_multiplier for name, m in simple.named_modules() if hasattr(m, "depthwise")}
    assert ranks == {row.name: row.depth_multiplier for row in plan.converted}
    want, have = model(x), simple(x)
    error = (want - have).square().sum() / (want - want.mean(0)).square().sum()
    assert plan.stages[0] == {"name": "closed form", "output_error": pytest.approx(float(error), rel=1e-3)}


def test_later_layers_answer_for_earlier_errors() -> None:
    model = trained(resnet)
    errors = {}
    model.requires_grad_(False)
    for method in ("svd", "least_squares", "sequential"):
        new, plan = convert(model, images(300), method=method, depth_multiplier=1, reestimate_bn=False)
        errors[method] = plan.stages[-1]["output_error"]
        want, have = model(images(300)), new(images(300))
        by_hand = (want - have).square().sum() / (want - want.mean(0)).square().sum()
        assert errors[method] == pytest.approx(float(by_hand))
    assert errors["sequential"] < 0.9 * errors["least_squares"]
    assert errors["least_squares"] < 0.9 * errors["svd"]


@pytest.mark.parametrize("metric", ["conv_params", "macs"])
@pytest.mark.parametrize("budget", [0.3, 0.6, 1.0])
def test_the_budget_is_kept_and_used(metric: str, budget: float) -> None:
    model = trained(resnet)
    new, plan = convert(model, images(), budget, metric=metric)
    before, after = plan.conv_params if metric == "conv_params" else plan.macs
    assert after <= budget * before
    assert after >= (0.75 * budget if budget < 1 else 1.0) * before
    weights = sum(m.weight.numel() for m in new.modules() if isinstance(m, nn.Conv2d))
    assert weights == plan.conv_params[1]
    assert sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d)) == plan.conv_params[0]


def test_a_budget_of_all_changes_nothing() -> None:
    model = trained(plain)
    new, plan = convert(model, images(), 1.0)
    state = new.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert {row.reason for row in plan.layers} == {"the budget is better spent on other layers"}


def test_latency_as_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    def pretend(modules: dict[int, nn.Module], x: Tensor) -> dict[int, float]:
        assert all(module(x).shape == modules[0](x).shape for module in modules.values())
        return {m: 0.2 + 0.1 * m if m else float(modules[0].kernel_size[0]) for m in modules}

    monkeypatch.setattr(options, "_median_time", pretend)
    model = nn.Sequential(conv(4, 8, 3), nn.ReLU(), conv(8, 8, 5), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    _, plan = convert(model.double(), images()[:, [0, 1, 2, 0]], (3 + 0.7) / 8, metric="latency")
    paid = [0.2 + 0.1 * row.depth_multiplier if row.depth_multiplier else row.kernel_size[0] for row in plan.layers]
    assert sum(paid) <= 3 + 0.7 + 1e-9
    assert plan.converted


def test_latency_is_measured() -> None:
    (site,) = record(nn.ReLU(), find_sites(nn.Sequential(conv(3, 4))), images(1, dtype=torch.float32))
    site.inputs, site.outputs = [(3, 9, 9)], [(4, 9, 9)]
    found = latencies(site, [1, 3])
    assert list(found) == [0, 1, 3]
    assert all(0 < seconds < 10 for seconds in found.values())


def test_network_decoupling_without_any_image() -> None:
    model = trained(plain)
    new, plan = convert(model, None, 0.5, method="svd")
    assert plan.images == 0
    assert plan.stages == []
    assert plan.macs is None
    assert plan.conv_params[1] <= 0.5 * plan.conv_params[0]
    assert new(images()).shape == (40, 5)
    with_example, _ = convert(model, None, 0.5, method="svd", example_input=images(2))
    assert all(torch.equal(a, b) for a, b in zip(new.parameters(), with_example.parameters(), strict=True))
    _, plan = convert(model, None, 0.5, method="svd", metric="macs", example_input=images(2))
    assert plan.macs[1] <= 0.5 * plan.macs[0]


def test_the_closed_form_sees_the_scale_of_the_batch_norm() -> None:
    model = trained(plain)
    with torch.no_grad():
        model[1].weight[:4] = 100
    new, _ = convert(model, None, method="svd", depth_multiplier=1)
    lost = (new[0](images()) - model[0](images())).square().mean((0, 2, 3))
    with torch.no_grad():
        model[1].weight[:4] = 0.01
    other, _ = convert(model, None, method="svd", depth_multiplier=1)
    lost_unscaled = (other[0](images()) - model[0](images())).square().mean((0, 2, 3))
    assert lost[:4].sum() < 0.7 * lost_unscaled[:4].sum()


def test_float32_and_channels_last_are_kept() -> None:
    model = trained(plain).float().to(memory_format=torch.channels_last)
    batch = images(dtype=torch.float32).contiguous(memory_format=torch.channels_last)
    new, _ = convert(model, batch, depth_multiplier=9)
    assert all(p.dtype == torch.float32 for p in new.parameters())
    assert new[4].pointwise.weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(new(batch), model(batch), rtol=1e-3, atol=1e-4)


def test_half_precision_is_kept() -> None:
    model = trained(plain).bfloat16()
    new, plan = convert(model, images(), depth_multiplier=9)
    assert all(p.dtype == torch.bfloat16 for p in new.parameters())
    assert plan.stages[-1]["output_error"] < 0.02


def test_signals_and_volumes() -> None:
    signal = nn.Sequential(nn.Conv1d(3, 8, 5), nn.ReLU(), nn.Conv1d(8, 8, 3), nn.Flatten()).double()
    new, _ = convert(signal, torch.randn(50, 3, 19, dtype=torch.float64), depth_multiplier=5)
    assert isinstance(new[0], SeparableConv1d)
    x = torch.randn(4, 3, 19, dtype=torch.float64)
    torch.testing.assert_close(new(x), signal(x))
    volume = nn.Sequential(nn.Conv3d(3, 30, (2, 3, 3), padding=1), nn.Flatten()).double()
    new, _ = convert(volume, torch.randn(8, 3, 5, 6, 7, dtype=torch.float64), depth_multiplier=18)
    assert isinstance(new[0], SeparableConv3d)
    x = torch.randn(4, 3, 5, 6, 7, dtype=torch.float64)
    torch.testing.assert_close(new(x), volume(x))


def test_calibration_as_batches_with_labels() -> None:
    model = trained(plain)
    whole = convert(model, images(), depth_multiplier=1)[0]
    loader = [(images()[:25], torch.zeros(25)), (images()[25:], torch.zeros(15))]
    for source in (loader, iter(loader)):
        parts, plan = convert(model, source, depth_multiplier=1)
        assert plan.images == 40
        torch.testing.assert_close(parts(images()), whole(images()), rtol=1e-6, atol=1e-8)


class Bad(nn.Module):
    """Every way in which a convolution must stay as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 6)
        self.grouped = conv(6, 6, groups=2)
        self.depthwise = conv(6, 6, groups=6)
        self.point = nn.Conv2d(6, 6, 1)
        self.turned = nn.ConvTranspose2d(6, 6, 3, padding=1)
        self.idle = conv(6, 6)
        self.normed = nn.utils.parametrizations.weight_norm(conv(6, 6))
        self.hooked = conv(6, 6)
        self.hooked.register_forward_hook(lambda module, args, output: output * 2)
        self.tied = conv(6, 6)
        self.twin = conv(6, 6)
        self.twin.weight = self.tied.weight
        self.own = Own(6, 6, 3, padding=1)
        self.skipped = nn.Sequential(conv(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = layer(x) if layer is not self.idle else nn.functional.conv2d(x, layer.weight, padding=1)
        return x


class Own(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


REASONS = {
    "stem": "",
    "grouped": "grouped (groups=2)",
    "depthwise": "already depthwise",
    "point": "already pointwise (1x1)",
    "turned": "a transposed convolution",
    "idle": "its forward never ran on the images",
    "normed": "its weight is computed from others (a parametrization)",
    "hooked": "it has hooks",
    "tied": "another module uses its weight",
    "twin": "another module uses its weight",
    "own": "Own has a forward of its own",
    "skipped.0": "skipped as asked",
}


def test_each_convolution_that_stays_has_its_reason() -> None:
    model = Bad().double()
    new, plan = convert(model, images(), depth_multiplier=9, skip=["skipped"])
    assert {row.name: row.reason for row in plan.layers} == REASONS
    assert [row.name for row in plan.converted] == ["stem"]
    torch.testing.assert_close(new(images()), model(images()))
    _, plan = convert(model, images(), depth_multiplier=9, skip=lambda name, module: name == "skipped.0")
    assert {row.name: row.reason for row in plan.layers} == REASONS


def test_a_layer_too_large_to_calibrate_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "LARGEST", 90)
    _, plan = convert(trained(plain), images(), depth_multiplier=1)
    assert [row.depth_multiplier for row in plan.layers] == [1, 1, 0]
    assert plan.layers[2].reason == "too large to calibrate: 108 values in a patch, at most 90"
    _, plan = convert(trained(plain), images(), depth_multiplier=1, method="svd")
    assert [row.depth_multiplier for row in plan.layers] == [1, 1, 1]


def test_nothing_to_convert() -> None:
    with pytest.raises(ValueError, match=r"Sequential has no convolution to convert \(0: already pointwise \(1x1\)\)"):
        convert(nn.Sequential(nn.Conv2d(3, 4, 1)), images(dtype=torch.float32))
    with pytest.raises(ValueError, match=r"Linear has no convolution to convert \(it has no nn\.Conv1d/2d/3d at all"):
        convert(nn.Linear(13, 4), images(dtype=torch.float32))
    with pytest.raises(ValueError, match="0: no depth multiplier makes it cheaper"):
        convert(nn.Sequential(nn.Conv2d(3, 1, 3)), images(dtype=torch.float32))


def test_an_unreachable_budget_names_the_smallest() -> None:
    model = trained(plain)
    with pytest.raises(ValueError, match=r"budget 0\.05 of the convolutions' weights cannot be reached") as caught:
        convert(model, images(), 0.05)
    smallest = float(str(caught.value).split("smallest reachable is ")[1].split(" ")[0])
    _, plan = convert(model, images(), smallest)
    assert [row.depth_multiplier for row in plan.layers] == [1, 1, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 0}, r"budget must be over 0 and at most 1, got 0"),
        ({"budget": -0.5}, r"budget must be over 0 and at most 1, got -0\.5"),
        ({"budget": 1.5}, r"budget must be over 0 and at most 1, got 1\.5"),
        ({"budget": float("nan")}, r"budget must be over 0 and at most 1, got nan"),
        ({"metric": "flops"}, r"metric must be one of conv_params, macs, latency, got 'flops'"),
        ({"method": "magic"}, r"method must be one of sequential, least_squares, svd, got 'magic'"),
        ({"depth_multiplier": 0}, r"depth_multiplier must be at least 1, got 0"),
        ({"calibration": None}, r"method='sequential' needs calibration images; without any, use method='svd'"),
        ({"calibration": None, "method": "svd", "metric": "macs"}, r"metric='macs' needs calibration images or an ex"),
        ({"skip": ["nowhere"]}, r"skip names 'nowhere', which is no module of Sequential"),
        ({"calibration": torch.zeros(0, 3, 8, 8)}, r"calibration holds no images"),
        ({"calibration": []}, r"calibration holds no images"),
        ({"calibration": torch.full((2, 3, 8, 8), float("nan"))}, r"calibration images hold NaN or infinity"),
    ],
    ids=str,
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"convert: {message}"):
        convert(plain(), **{"calibration": images(dtype=torch.float32), **arguments})


def test_bad_types() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        convert("resnet18", images())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"calibration must be a tensor or batches of tensors, got str"):
        convert(plain(), ["image.png"])
    with pytest.raises(TypeError, match=r"calibration images must be floating point, got torch\.uint8"):
        convert(plain(), torch.zeros(2, 3, 8, 8, dtype=torch.uint8))


class ReadsWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(3, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.to(self.conv.weight.dtype))


class HidesConv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(3, 6)
        self.hidden = [self.conv]

    def forward(self, x: Tensor) -> Tensor:
        return self.hidden[0](x)


def test_networks_that_need_the_normal_convolution_say_so() -> None:
    with pytest.raises(ValueError, match=r"only a normal convolution has .* 'weight'.*; name that convolution in skip"):
        convert(ReadsWeight().double(), images(), depth_multiplier=1)
    with pytest.raises(ValueError, match=r"the model calls conv by another way than its name; name it in skip"):
        convert(HidesConv().double(), images(), depth_multiplier=1)


class Undifferentiable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = plain()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"class": self.body(x).argmax(1)}


def test_outputs_without_gradient_fall_back_with_a_note() -> None:
    new, plan = convert(Undifferentiable().double(), images(), 0.5)
    assert "not differentiable" in plan.notes[0]
    assert plan.conv_params[1] <= 0.5 * plan.conv_params[0]
    assert new(images())["class"].shape == (40,)


def test_the_plan_is_json_and_a_narrow_table() -> None:
    model = trained(plain)
    _, plan = convert(nn.Sequential(*[nn.Sequential(model)] * 1), images(), 0.4)
    record = json.loads(json.dumps(plan.to_dict()))
    assert record["conv_params_after"] == plan.conv_params[1]
    assert record["layers"][0]["kernel_size"] == [3, 3]
    assert Plan(**{key: record[key] for key in ("method", "metric", "budget", "images")}, layers=[]).budget == 0.4
    lines = str(plan).splitlines()
    assert max(map(len, lines)) <= 100
    assert [line.split()[0] for line in lines].count("0.0.4") == 1
    assert any(line.startswith("sequential, budget 0.4 of conv_params, 40 images: conv weights 1/") for line in lines)
