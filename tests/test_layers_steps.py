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


@pytest.mark.slow
@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("activation", [nn.SiLU, nn.ReLU6])
def test_long_loss_curve_in_both_rounding_directions(activation: type[nn.Module]) -> None:
    """After some hundred steps no two orders of summation give the same numbers; the curves stay as near to each other
    as that of float64 is to PyTorch's own in float32, up to a factor. Where an activation has a corner, rounding
    decides on which side of it a number falls: from there on a curve is another one that learns as well."""
    torch.manual_seed(3)
    start = network()
    for at, module in enumerate(start):
        if isinstance(module, nn.ReLU6):
            start[at] = activation()
    runs: dict[str, list[float]] = {}
    for name in ("ours", "plain", "exact"):
        model = copy.deepcopy(start)
        if name == "ours":
            sepconv.replace_layers(model)
        model = model.double() if name == "exact" else model
        optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
        generator, losses = torch.Generator().manual_seed(1), []
        for _ in range(200):
            x = torch.randn(16, 3, 11, 7, generator=generator).contiguous(memory_format=torch.channels_last)
            labels = (x.mean((1, 2, 3)) * 20).long().clamp(-2, 2) + 2
            loss = F.cross_entropy(model(x.double() if name == "exact" else x), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        runs[name] = losses
    of_plain = max(abs(a - b) for a, b in zip(runs["plain"], runs["exact"], strict=True))
    of_ours = max(abs(a - b) for a, b in zip(runs["ours"], runs["exact"], strict=True))
    assert runs["exact"][-1] < runs["exact"][0]
    if activation is nn.SiLU:
        assert of_ours <= 8 * of_plain + 1e-5
    else:
        lasts = [sum(runs[name][-50:]) / 50 for name in ("ours", "exact")]
        assert abs(lasts[0] - lasts[1]) <= 0.01 * lasts[1]
        assert of_ours <= 0.05  # of losses around 1: nowhere a jump


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
