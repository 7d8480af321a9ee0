"""Training with our layers is training with PyTorch's: whatever stands between the convolutions, and whoever looks."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from trainable import EPS, Branch, Residual, always, assert_as_exact, gradients, images, network, ours, stage

import sepconv
from sepconv.ops.pending import Pending

__all__ = ["always"]
pytestmark = pytest.mark.usefixtures("always")


class _Swish(torch.autograd.Function):
    """An activation of somebody's own, which asks nobody before it takes a tensor's numbers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        [x] = ctx.saved_tensors
        s = torch.sigmoid(x)
        return grad * s * (1 + x * (1 - s))


class _Doubled(torch.autograd.Function):
    """Changes its input in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        x.mul_(2)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


class _Reversed(torch.autograd.Function):
    """Changes the gradient of its input in place, and not one number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -grad


def _hooked(x: Tensor) -> Tensor:
    x.register_hook(lambda grad: 2 * grad)
    return x


def _kept(x: Tensor) -> Tensor:
    x.retain_grad()
    return x


def _watched(x: Tensor) -> Tensor:
    with torch.no_grad():
        assert torch.isfinite(x).all()
    return x


def _in_place(x: Tensor) -> Tensor:
    x.mul_(0.5)
    return x


def _half_in_place(x: Tensor) -> Tensor:
    x[:, ::2] = 0.0
    return x


def _twice(x: Tensor) -> Tensor:
    return torch.cat([x[:, :6], x[:, 6:] * x[:, :6].mean()], 1)


USES: dict[str, Callable[[Tensor], Tensor]] = {
    "custom function": _Swish.apply,
    "custom function in place": _Doubled.apply,
    "custom function of the gradient in place": _Reversed.apply,
    "gradient hook": _hooked,
    "retained gradient": _kept,
    "looked at": _watched,
    "in place": _in_place,
    "part in place": _half_in_place,
    "used twice": _twice,
    "summed with itself": lambda x: x + x,
    "doubled": lambda x: 2 * x + x.mean(),
    "dropout": lambda x: F.dropout(x, 0.0),
    "pool": lambda x: F.max_pool2d(x, 2),
    "other layout": lambda x: x.contiguous(),
    "view": lambda x: x.flatten(2).unflatten(2, x.shape[2:]),
    "detached part": lambda x: x * x.detach().mean().sigmoid(),
    "checkpoint": lambda x: checkpoint(lambda y: y.sin() + y, x, use_reentrant=False),
    "reentrant checkpoint": lambda x: checkpoint(lambda y: y.sin() + y, x, use_reentrant=True),
    "out": lambda x: torch.add(x.detach(), 1) * x,
    "split": lambda x: torch.cat(x.chunk(2, 1)[::-1], 1),
    "norm again": lambda x: F.batch_norm(x, None, None, training=True),
}


@pytest.mark.parametrize("use", USES)
def test_whatever_happens_between_convolutions(use: str) -> None:
    assert_as_exact(network(Branch(USES[use])), images(), gradients)


@pytest.mark.parametrize("use", ["custom function", "gradient hook", "looked at", "in place", "doubled", "checkpoint"])
def test_whatever_happens_right_behind_a_convolution(use: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Branch(USES[use]), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1), nn.Flatten())
    assert_as_exact(model, images(), gradients)


def _residual(in_place: bool, *around: nn.Module) -> nn.Module:
    body = nn.Sequential(*stage(12, 24), *stage(24, 24, 3, groups=24), nn.Conv2d(24, 12, 1), nn.BatchNorm2d(12))
    return nn.Sequential(Residual(body, in_place), *around)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("behind", [nn.Identity, nn.ReLU, nn.BatchNorm2d])
def test_residuals(in_place: bool, behind: Callable[..., nn.Module]) -> None:
    last = behind(12) if behind is nn.BatchNorm2d else behind()
    assert_as_exact(network(_residual(in_place, last)), images(), gradients)


def _penalty(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Gradients of a gradient."""
    x = x.clone().requires_grad_()
    [grad] = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    grad.square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("run", [gradients, _penalty])
def test_norms_behind_pools(run: Callable[[nn.Module, Tensor], dict[str, Tensor]]) -> None:
    between = nn.Sequential(nn.MaxPool2d(2), nn.BatchNorm2d(12), nn.SiLU())
    assert_as_exact(network(between), images(), run)


def test_kernels_of_stages_run() -> None:
    """One pass a convolution forward and back, and one at the end, where the pool needs numbers."""
    model, _ = ours(network())
    with sepconv.ops.explain.record() as choices:
        gradients(model, images())
    ran = [choice.op for choice in choices]
    there = ["normal_stage", "pointwise_stage", "depthwise_stage", "pointwise_stage"]
    assert ran == [
        *there, "finish_stage", "finish_stage_gradients", *[f"{op}_gradients" for op in reversed(there)]
    ]  # fmt: skip


_ONE_FIXTURE = [HealthCheck.function_scoped_fixture]  # the same for all examples
_NO_SHRINKING = (Phase.explicit, Phase.reuse, Phase.generate)
_CONVS = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(["depthwise", "pointwise", "normal", "grouped"]),
        "kernel": st.sampled_from([1, 2, 3, 5]),
        "stride": st.integers(1, 2),
        "padding": st.integers(0, 2),
        "dilation": st.integers(1, 2),
        "bias": st.booleans(),
    }
)
_NORMS = st.fixed_dictionaries(
    {
        "eps": st.sampled_from([1e-5, 1e-3]),
        "momentum": st.sampled_from([0.1, None, 0.0]),
        "affine": st.booleans(),
        "track_running_stats": st.booleans(),
    }
)
_ACTIVATIONS = st.sampled_from(
    [
        nn.Identity, nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.GELU, nn.Sigmoid, nn.Hardsigmoid, nn.Tanh, nn.Mish,
        lambda: nn.ReLU(inplace=True), lambda: nn.LeakyReLU(0.2), lambda: nn.ELU(0.5), lambda: nn.Hardtanh(-2.0, 2.0),
    ]
)  # fmt: skip


def _random_network(drawn: list[tuple[dict[str, Any], dict[str, Any] | None, Any]]) -> nn.Sequential:
    modules: list[nn.Module] = []
    channels = 4
    for conv, norm, activation in drawn:
        kind = conv["kind"]
        outputs = channels if kind == "depthwise" else 8 if channels == 4 else 4
        groups = {"depthwise": channels, "grouped": 2}.get(kind, 1)
        kernel = 1 if kind == "pointwise" else conv["kernel"]
        padding = 0 if kind == "pointwise" else conv["padding"] + conv["dilation"] * (kernel - 1) // 2
        options = (outputs, kernel, conv["stride"], padding, conv["dilation"], groups, conv["bias"])
        modules.append(nn.Conv2d(channels, *options))
        channels = outputs
        if norm is not None:
            modules += [nn.BatchNorm2d(channels, **norm), activation()]
    return nn.Sequential(*modules)


@settings(
    max_examples=20, deadline=None, phases=_NO_SHRINKING, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    drawn=st.lists(st.tuples(_CONVS, st.none() | _NORMS, _ACTIVATIONS), min_size=1, max_size=4),
    batch=st.integers(2, 3),
    seed=st.integers(0, 99),
    evaluating=st.booleans(),
)
def test_random_networks(drawn: Any, batch: int, seed: int, evaluating: bool) -> None:
    torch.manual_seed(seed)
    model = _random_network(drawn).train(not evaluating)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d) and norm.affine:
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)
    x = torch.randn(batch, 4, 13, 11).contiguous(memory_format=torch.channels_last)
    zero = {
        f"{i}.bias"
        for i, norm in enumerate(model[1:])
        if isinstance(norm, nn.BatchNorm2d) and not (evaluating and norm.track_running_stats)
    }

    def run(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
        """A bias before a norm has no gradient but what rounding leaves of large numbers."""
        return {name: t for name, t in gradients(model, x).items() if name not in zero}

    assert_as_exact(model, x, run)


def test_statistics_of_large_means_are_stable() -> None:
    """A mean of 1e4 with deviation 1: the difference of two squares would keep no digit of the variance."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1))
    with torch.no_grad():
        model[0].weight.normal_()
        model[0].bias.fill_(1e4)
    replaced, _ = ours(model)
    x = images(4, (17, 13))
    exact = copy.deepcopy(model).double()
    assert (replaced(x) - exact(x.double())).abs().max() < 3e4 * EPS * 8
    # The values themselves have an error of 1e4 * eps / 2, which is what the variance can know.
    torch.testing.assert_close(replaced[1].running_var.double(), exact[1].running_var, rtol=1e-3, atol=0)


def test_one_value_a_channel_is_refused_as_by_pytorch() -> None:
    model, _ = ours(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model(images(1, (3, 3)))


def test_batch_of_one_and_counters() -> None:
    model = network()
    replaced = assert_as_exact(model, images(1), gradients)
    assert replaced[1].num_batches_tracked == 1


def test_frozen_norms_inside_training() -> None:
    model = network()
    gradients(model, images())
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
            module.weight.requires_grad_(False)
    replaced = assert_as_exact(model, images(), gradients)
    assert replaced[1].num_batches_tracked == 1


def test_frozen_convolutions() -> None:
    model = network()
    model[0].weight.requires_grad_(False)
    model[6].weight.requires_grad_(False)
    assert_as_exact(model, images(), gradients)


def test_hooks_on_modules_see_ordinary_numbers() -> None:
    model, _ = ours(network())
    plain = sepconv.restore_layers(copy.deepcopy(model))
    seen: dict[str, list[Tensor]] = {"ours": [], "plain": []}
    for name, one in (("ours", model), ("plain", plain)):
        for module in one.modules():
            module.register_forward_hook(lambda m, args, y, name=name: seen[name].append(y.detach().clone()))
            module.register_full_backward_hook(lambda m, grads, given, name=name: seen[name].append(given[0].clone()))
        gradients(one, images())
    assert len(seen["ours"]) == len(seen["plain"]) > 20
    assert all(type(y) is Tensor for y in seen["ours"])


def test_double_backward() -> None:
    assert_as_exact(network(), images(), _penalty)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_parts(reentrant: bool) -> None:
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(*stage(12, 12, 3, groups=12), *stage(12, 12))

        def forward(self, x: Tensor) -> Tensor:
            return x + checkpoint(self.body, x, use_reentrant=reentrant)

    def run(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
        """How often a batch counts in the statistics of a part that is computed twice is PyTorch's secret."""
        return {name: t for name, t in gradients(model, x).items() if "running" not in name}

    assert_as_exact(network(Part()), images(), run)


def test_saved_tensors_may_be_moved() -> None:
    def run(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
            return gradients(model, x)

    assert_as_exact(network(_residual(False)), images(), run)


def test_anomaly_mode_names_the_culprit() -> None:
    with torch.autograd.set_detect_anomaly(True):
        assert_as_exact(network(), images(), gradients)
        model, _ = ours(network())
        with torch.no_grad():
            model[1].weight[0] = float("nan")
        with pytest.warns(UserWarning, match="Traceback of forward call"), pytest.raises(RuntimeError, match="nan"):
            gradients(model, images())


def test_inputs_changed_before_they_were_used_are_noticed() -> None:
    model, _ = ours(nn.Sequential(nn.Conv2d(3, 4, 1)))
    model._forward_hooks.clear()
    x = images()
    y = model(x)
    assert type(y) is Pending
    x.add_(1)
    with pytest.raises(RuntimeError, match="pointwise convolution: its input or weight was modified by an inplace"):
        y.sum()


def test_a_pending_tensor_is_a_tensor() -> None:
    model, _ = ours(nn.Sequential(*stage(3, 4)))
    model._forward_hooks.clear()
    y = model(images())
    assert isinstance(y, Tensor)
    assert (y.requires_grad, y.is_leaf, y.grad_fn is None, len(y)) == (True, False, False, 3)
    assert (y.shape, y.is_contiguous(memory_format=torch.channels_last)) == ((3, 4, 11, 7), True)
    assert y.work.finished is None  # nobody needed the numbers
    assert y.detach().numpy().shape == (3, 4, 11, 7)
    assert y.data_ptr() == y.work.finished.data_ptr()
    assert type(copy.deepcopy(y.detach())) is Tensor
    assert "grad_fn" in repr(y)
    file = io.BytesIO()
    torch.save(y, file)
    file.seek(0)
    torch.testing.assert_close(torch.load(file, weights_only=True), y.detach())
    assert [type(image) for image in y] == [Tensor] * 3
    assert y[0, 0, 0, 0].item() == y.tolist()[0][0][0][0]


def test_gradients_reach_a_pending_tensor_itself() -> None:
    model, _ = ours(nn.Sequential(*stage(3, 4)))
    model._forward_hooks.clear()
    x = images().requires_grad_()
    y = model(x)
    [grad] = torch.autograd.grad(_Swish.apply(y).sum(), x)
    plain = sepconv.restore_layers(copy.deepcopy(model))
    [expected] = torch.autograd.grad(_Swish.apply(plain(x)).sum(), x)
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("later", [False, True])
def test_a_separable_layer_waits_for_its_norms_wherever_they_come_from(later: bool) -> None:
    norm = None if later else "batch"
    layer = sepconv.SeparableConv2d(16, 8, 3, padding=1, bias=False, norm=norm, activation="relu").train()
    if later:  # as a file is opened
        layer.depthwise_norm, layer.pointwise_norm = torch.nn.BatchNorm2d(16), torch.nn.BatchNorm2d(8)
    x = torch.randn(8, 16, 32, 33).contiguous(memory_format=torch.channels_last)
    with sepconv.ops.explain.record() as seen:
        layer(x).sum().backward()
    assert [choice.op for choice in seen[:2]] == ["depthwise_stage", "pointwise_stage"]
