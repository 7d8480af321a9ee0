"""Steps of training with our layers: loss curves, checkpoints, averages, mixed precision, many processes."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from trainable import always, assert_as_exact, gradients, images, network, ours, stage

import sepconv
from sepconv.kernels.torch import stages as by_torch
from sepconv.layers import SeparableConv2d

__all__ = ["always"]


@pytest.mark.usefixtures("always")
def test_a_layer_alone_gives_ordinary_tensors() -> None:
    layer = SeparableConv2d(3, 4, 3, padding=1, norm="batch", activation="relu")
    assert type(layer(images())) is Tensor
    plain = copy.deepcopy(layer)
    for conv in (plain.depthwise, plain.pointwise):
        conv.waits = False
    assert_close_steps(layer, plain, steps=1)


def assert_close_steps(model: nn.Module, plain: nn.Module, steps: int, factor: float = 1.0) -> None:
    """Both learn alike, step by step; rounding grows with the steps."""
    optimizers = [torch.optim.SGD(m.parameters(), 0.05, momentum=0.9, weight_decay=1e-4) for m in (model, plain)]
    for step in range(steps):
        x, losses = images(8), []
        for one, optimizer in zip((model, plain), optimizers, strict=True):
            y = one(x)
            loss = F.cross_entropy(y, torch.arange(8) % 5) if y.dim() == 2 else y.square().mean()
            optimizer.zero_grad(set_to_none=step % 2 == 0)
            loss.backward()
            nn.utils.clip_grad_norm_(one.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
        assert abs(losses[0] - losses[1]) <= factor * 1e-5 * 1.2**step, (step, losses)


@pytest.mark.usefixtures("always")
def test_loss_curve() -> None:
    model, plain = ours(network())[0], None
    plain = sepconv.restore_layers(copy.deepcopy(model))
    assert_close_steps(model, plain, steps=20)


Sides = tuple[Tensor, Tensor]
"""Of ReLU6's two corners: where its argument is not above the lower one, where not below the upper one."""


def _sides(argument: Tensor) -> Sides:
    return argument.detach() <= 0, argument.detach() >= 6


class _SidedReLU6(nn.Module):
    """ReLU6 that takes the sides of the corners from another run; ``farthest``: how far a number was on its own."""

    def __init__(self, sides: list[Sides]) -> None:
        super().__init__()
        self.sides, self.farthest = iter(sides), 0.0

    def forward(self, x: Tensor) -> Tensor:
        low, high = next(self.sides)
        for corner, there, here in zip((0.0, 6.0), (low, high), _sides(x), strict=True):
            away = (x.detach() - corner).abs()[there != here]
            self.farthest = max([self.farthest, *away.tolist()])
        return torch.where(low, 0.0, torch.where(high, 6.0, x))


def _losses(model: nn.Module, steps: int = 200, before: Any = None) -> list[float]:
    """Of a small task; ``before`` is told when a forward pass begins and ends."""
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    generator, losses = torch.Generator().manual_seed(1), []
    dtype = next(model.parameters()).dtype
    for _ in range(steps):
        x = torch.randn(16, 3, 11, 7, generator=generator).contiguous(memory_format=torch.channels_last)
        labels = (x.mean((1, 2, 3)) * 20).long().clamp(-2, 2) + 2
        if before is not None:
            before(True)
        loss = F.cross_entropy(model(x.to(dtype)), labels)
        if before is not None:
            before(False)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def _farthest(a: list[float], b: list[float]) -> float:
    return max(abs(one - other) for one, other in zip(a, b, strict=True))


def _with_activations(model: nn.Module, make: Any) -> nn.Module:
    made = copy.deepcopy(model)
    for at, module in enumerate(made):  # type: ignore[arg-type]
        if isinstance(module, nn.ReLU6):
            made[at] = make()  # type: ignore[operator]
    return made


@pytest.mark.slow
@pytest.mark.usefixtures("always")
def test_long_loss_curve() -> None:
    """After some hundred steps no two orders of summation give the same numbers; the curves stay as near to each other
    as that of float64 is to PyTorch's own in float32, up to a factor."""
    torch.manual_seed(3)
    start = _with_activations(network(), nn.SiLU)
    exact = _losses(copy.deepcopy(start).double())
    ours_, plain = _losses(ours(start)[0]), _losses(copy.deepcopy(start))
    assert exact[-1] < exact[0]
    assert _farthest(ours_, exact) <= 8 * _farthest(plain, exact) + 1e-5


@pytest.mark.slow
@pytest.mark.usefixtures("always")
def test_long_loss_curve_with_corners(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where an activation has corners, rounding decides on which side of one a number falls: from there on a curve is
    another one. Nothing else parts them: float64 with the same sides follows ours as near as it follows PyTorch's, and
    every number that fell on the other side lies no farther from the corner than rounding goes.
    """
    torch.manual_seed(3)
    start = network()
    of_ours: list[Sides] = []
    forward, normal = False, by_torch._normal

    def told(begins: bool) -> None:
        nonlocal forward
        forward = begins

    def watching(x: Tensor, prologue: Any) -> tuple[Tensor, Tensor]:
        found = normal(x, prologue)
        if forward:
            of_ours.append(_sides(found[1]))
        return found

    with monkeypatch.context() as patched:
        patched.setattr(by_torch, "_normal", watching)
        ours_ = _losses(ours(start)[0], before=told)
    model, of_plain = copy.deepcopy(start), []
    for module in model:
        if isinstance(module, nn.ReLU6):
            module.register_forward_pre_hook(lambda module, args: of_plain.append(_sides(args[0])))
    plain, distances = _losses(model), []
    assert len(of_ours) == len(of_plain) == 4 * 200
    for losses, sides in ((ours_, of_ours), (plain, of_plain)):
        sided = _SidedReLU6(sides)
        distances.append(_farthest(losses, _losses(_with_activations(start, lambda one=sided: one).double())))
        assert sided.farthest <= 1e-4
    assert distances[0] <= 8 * distances[1] + 1e-6


@pytest.mark.usefixtures("always")
def test_checkpoints_go_on_with_other_layers() -> None:
    """Weights and the optimizer's state, made with plain layers, are continued with ours, and back."""
    start = network()
    model, optimizer = start, torch.optim.SGD(start.parameters(), 0.1, momentum=0.9)
    other = copy.deepcopy(start)
    other_optimizer = torch.optim.SGD(other.parameters(), 0.1, momentum=0.9)
    sepconv.replace_layers(other)
    for step in range(4):
        x = images(8)
        for one, its in ((model, optimizer), (other, other_optimizer)):
            its.zero_grad()
            F.cross_entropy(one(x), torch.arange(8) % 5).backward()
            its.step()
        if step == 1:  # they change places
            states = [copy.deepcopy((one.state_dict(), its.state_dict())) for one, its in
                      ((model, optimizer), (other, other_optimizer))]  # fmt: skip
            model.load_state_dict(states[1][0])
            optimizer.load_state_dict(states[1][1])
            other.load_state_dict(states[0][0])
            other_optimizer.load_state_dict(states[0][1])
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("always")
def test_an_optimizer_made_before_goes_on() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sepconv.replace_layers(model)
    before = model[6].weight.detach().clone()
    model(images()).sum().backward()
    optimizer.step()
    assert not torch.equal(model[6].weight, before)


@pytest.mark.usefixtures("always")
def test_gradients_add_up_and_averages_of_weights_follow() -> None:
    def run(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
        average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn())
        for _ in range(2):
            found = gradients(model, x)
        average.update_parameters(model)
        return {**found, **{f"average {name}": p.detach() for name, p in average.named_parameters()}}

    assert_as_exact(network(), images(), run)


@pytest.mark.usefixtures("always")
def test_runs_are_equal_bit_by_bit() -> None:
    model, _ = ours(network())
    first, second = (gradients(copy.deepcopy(model), images_of(1)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def images_of(seed: int) -> Tensor:
    torch.manual_seed(seed)
    return images()


@pytest.mark.usefixtures("always")
def test_autocast_is_bfloat16_between_convolutions() -> None:
    model, _ = ours(network())
    plain = sepconv.restore_layers(copy.deepcopy(model))
    exact = copy.deepcopy(plain).double()
    x = images()
    truth = gradients(exact, x.double())
    with torch.autocast("cpu", torch.bfloat16), sepconv.ops.explain.record() as choices:
        found = gradients(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = gradients(plain, x)
    assert "depthwise_stage" in [choice.op for choice in choices]
    norm = lambda of: sum(float((of[n].double() - t).square().sum()) for n, t in truth.items()) ** 0.5  # noqa: E731
    assert norm(found) <= 2 * norm(theirs)
    assert all(t.dtype is torch.float32 for t in found.values())


@pytest.mark.usefixtures("always")
def test_scaled_gradients_of_float16() -> None:
    """Stages are for bfloat16: under autocast to float16 the layers compute by themselves, and a step whose gradients
    overflow is left out by both."""
    model, _ = ours(network())
    plain = sepconv.restore_layers(copy.deepcopy(model))
    losses: dict[nn.Module, list[float]] = {model: [], plain: []}
    scales: dict[nn.Module, list[float]] = {model: [], plain: []}
    for one in (model, plain):
        optimizer, scaler = torch.optim.SGD(one.parameters(), 0.05), torch.amp.GradScaler("cpu", init_scale=2.0**28)
        torch.manual_seed(1)
        for _ in range(16):
            with torch.autocast("cpu", torch.float16):
                loss = F.cross_entropy(one(images(8)).float(), torch.arange(8) % 5)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses[one].append(loss.item())
            scales[one].append(scaler.get_scale())
    assert scales[model] == scales[plain]
    assert 1 < scales[model][-1] < scales[model][0] < 2.0**28
    assert losses[model] == pytest.approx(losses[plain], abs=2e-2)
    with torch.autocast("cpu", torch.float16):
        told = {reason for choice in sepconv.explain(model, images()) for reason in choice.reasons.values()}
    assert "autocast is to torch.float16" in told


@pytest.mark.usefixtures("always")
def test_distributed_data_parallel(tmp_path: Any) -> None:
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:

        def run(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
            with warnings.catch_warnings():
                if not getattr(model[0], "waits", False):  # PyTorch's gradients have other strides than its weights
                    warnings.filterwarnings("ignore", message="Grad strides do not match")
                found = gradients(DistributedDataParallel(model), x)
            return {name.removeprefix("module."): t for name, t in found.items()}

        assert_as_exact(network(), images(), run)
    finally:
        torch.distributed.destroy_process_group()


def test_our_kernels_compute_whole_networks() -> None:
    """Each pass of a convolution, forward and back, and the one norm that a pool needs finished."""
    model = nn.Sequential(
        *stage(3, 16, 3), *stage(16, 16, 3, groups=16), *stage(16, 32), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    replaced, _ = ours(model)
    with sepconv.ops.explain.record() as choices:
        gradients(replaced, images(2, (24, 24)))
    assert {choice.op: choice.kernel for choice in choices} == dict.fromkeys(
        [
            *[f"{op}_stage{of}" for op in ("normal", "depthwise", "pointwise") for of in ("", "_gradients")],
            "finish_stage",
            "finish_stage_gradients",
        ],
        "halide",
    )
    assert_as_exact(model, images(2, (24, 24)), gradients)
