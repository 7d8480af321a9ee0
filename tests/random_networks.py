"""Random small networks: what people write between their convolutions, in any order.

A network is a list of steps, each made for the value that the steps before it give. Few different numbers of channels,
so that few kernels have to be compiled.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sepconv.layers import DepthwiseConv2d, SeparableConv2d

Function = Callable[..., Any]


class Step(nn.Module):
    """``function(x, earlier values, layers...)``."""

    def __init__(self, name: str, function: Function, *layers: nn.Module) -> None:
        super().__init__()
        self.name, self.function, self.layers = name, function, nn.ModuleList(layers)

    def forward(self, x: Tensor, earlier: list[Tensor]) -> Tensor:
        result: Tensor = self.function(x, earlier, *self.layers)
        return result


class RandomNetwork(nn.Module):
    """Steps, and how the result is returned; ``str(network)`` names them."""

    def __init__(self, seed: int, length: int = 8) -> None:
        super().__init__()
        self.rng = random.Random(seed)
        torch.manual_seed(seed)
        shape = (self.rng.choice((1, 1, 2, 3)), self.rng.choice((3, 8, 16)), *self.rng.sample((7, 8, 12, 17), 2))
        self.example, self.steps = _given(self.rng, torch.randn(shape)), nn.ModuleList()
        self.result = self.rng.choice(("last", "last", "all", "with_input", "view"))
        values = [self.example]
        while len(self.steps) < length:
            step = _step(self.rng, values[-1], values)
            if step is not None:
                with torch.no_grad():
                    value = step.eval()(values[-1], values)
                if 0 < value.numel() < 40_000 and value.isfinite().all():
                    self.steps.append(step)
                    values.append(value)
        del self.rng
        self.eval()

    def forward(self, x: Tensor) -> Any:
        values = [x]
        for step in self.steps:
            values.append(step(values[-1], values))
        if self.result == "all":
            return {"last": values[-1], "others": tuple(values[1:-1:2])}
        if self.result == "with_input":
            return [values[-1], x]
        return values[-1].transpose(0, 1) if self.result == "view" else values[-1]

    def __str__(self) -> str:
        return " ".join([f"{tuple(self.example.shape)}", *(step.name for step in self.steps), self.result])


def _given(rng: random.Random, x: Tensor) -> Tensor:
    """In one of the layouts in which inputs come."""
    how = rng.choice(("contiguous", "channels_last", "sliced", "odd"))
    if how == "channels_last":
        return x.to(memory_format=torch.channels_last)
    if how == "sliced":
        return torch.randn(*x.shape[:3], x.shape[3] + 2)[..., 1:-1]
    if how == "odd" and x.shape[0] == 1:
        return x.contiguous(memory_format=torch.channels_last).as_strided(x.shape, (5, *x.stride()[1:]))
    return x


def _step(rng: random.Random, x: Tensor, values: list[Tensor]) -> Step | None:
    make = rng.choice(_IMAGE_STEPS if x.dim() == 4 else _TOKEN_STEPS if x.dim() == 3 else _VECTOR_STEPS)
    made: Step | None = make(rng, x, values)
    return made


def _plain(name: str, function: Callable[[Tensor], Tensor]) -> Callable[..., Step]:
    return lambda rng, x, values: Step(name, lambda x, _: function(x))


def _layer(name: str, layer: nn.Module) -> Step:
    return Step(name, lambda x, _, layer: layer(x), layer)


def _normal(rng: random.Random, x: Tensor, values: list[Tensor]) -> Step | None:
    side = rng.choice((1, 3))
    if min(x.shape[2:]) < 3:
        return None
    out, stride = rng.choice((8, 16)), rng.choice((1, 1, 2))
    groups = rng.choice((1, 1, 2)) if x.shape[1] % 2 == 0 else 1
    dilation = rng.choice((1, 1, 2)) if min(x.shape[2:]) > 5 else 1
    conv = nn.Conv2d(x.shape[1], out, side, stride, dilation * (side // 2), dilation, groups, rng.random() < 0.5)
    return _layer(f"conv{side}s{stride}d{dilation}g{groups}", conv)


def _depthwise(rng: random.Random, x: Tensor, values: list[Tensor]) -> Step:
    kind = rng.choice((nn.Conv2d, DepthwiseConv2d))
    channels, side = x.shape[1], rng.choice((3, 5))
    if kind is DepthwiseConv2d:
        return _layer(f"our_depthwise{side}", DepthwiseConv2d(channels, side, padding=side // 2))
    return _layer(f"depthwise{side}", nn.Conv2d(channels, channels, side, 1, side // 2, groups=channels))


def _pointwise(rng: random.Random, x: Tensor, values: list[Tensor]) -> Step:
    return _layer("pointwise", nn.Conv2d(x.shape[1], rng.choice((8, 16)), 1, bias=rng.random() < 0.5))


def _separable(rng: random.Random, x: Tensor, values: list[Tensor]) -> Step:
    norm, activation = rng.choice((None, "batch")), rng.choice((None, "relu6", "hardswish"))
    options: dict[str, Any] = {"padding": 1, "norm": norm, "activation": activation, "bias": norm is None}
    return _layer(f"separable({norm},{activation})", _shaken(SeparableConv2d(x.shape[1], 8, 3, **options)))


def _residual(rng: random.Random, x: Tensor, values: list[Tensor]) -> Step:
    """A block whose input is added to what its last layer gives."""
    channels = x.shape[1]
    inner = nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1, groups=channels),
        rng.choice((nn.Identity, nn.ReLU6))(),
        nn.Conv2d(channels, channels, 1),
    )
    return Step("residual", lambda x, _, inner: x + inner(x), inner)


def _norm(rng: random.Random, x: Tensor, values: list[Tensor]) -> Step:
    channels = x.shape[1]
    if rng.random() < 0.3 and channels % 2 == 0:
        return _layer("group_norm", nn.GroupNorm(2, channels))
    return _layer("batch_norm", _shaken(nn.BatchNorm2d(channels)))


def _shaken(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2.0)  # type: ignore[arg-type]
            nn.init.normal_(module.running_mean, std=0.3)  # type: ignore[arg-type]
    return model


def _activation(rng: random.Random, x: Tensor, values: list[Tensor]) -> Step:
    kinds: list[Callable[[Tensor], Tensor]] = [
        F.relu, F.relu6, F.silu, F.hardswish, F.gelu, F.leaky_relu, F.mish, torch.tanh, torch.sigmoid,
        lambda x: x.clone().relu_(), lambda x: (x + 1).clamp_(0, 6), lambda x: x * torch.sigmoid(x),
    ]  # fmt: skip
    i = rng.randrange(len(kinds))
    return Step(f"activation{i}", lambda x, _: kinds[i](x))


def _combine(rng: random.Random, x: Tensor, values: list[Tensor]) -> Step | None:
    """With an earlier value: added, multiplied, joined."""
    same = [i for i, value in enumerate(values[:-1]) if value.shape == x.shape]
    if same and rng.random() < 0.7:
        i, multiply = rng.choice(same), rng.random() < 0.3
        return Step("mul" if multiply else "add", lambda x, e: x * e[i] if multiply else e[i] + x)
    size = (x.shape[0], *x.shape[2:])
    fits = [i for i, value in enumerate(values[:-1]) if (value.shape[0], *value.shape[2:]) == size]
    if fits:
        i = rng.choice(fits)
        return Step("cat", lambda x, e: torch.cat([x, e[i]], 1)[:, :16])
    return None


def _halves(rng: random.Random, x: Tensor, values: list[Tensor]) -> Step | None:
    if x.shape[1] % 2:
        return None
    i = rng.randrange(4)

    def run(x: Tensor, _: Any) -> Tensor:
        if i == 0:
            a, b = x.chunk(2, 1)
            return torch.cat([b, a], 1)
        if i == 1:
            a, b = x.split(x.shape[1] // 2, 1)
            return torch.cat([a * torch.sigmoid(b), b], 1)
        if i == 2:
            a, *others = x.unbind(1)
            return torch.stack([*others, a], 1)
        return torch.stack([x[:, ::2], x[:, 1::2]], 2).flatten(1, 2)

    return Step(f"halves{i}", run)


def _slice(rng: random.Random, x: Tensor, values: list[Tensor]) -> Step | None:
    if min(x.shape[2:]) < 4 or x.shape[1] != 16:
        return None
    i = rng.randrange(4)
    cuts: list[Callable[[Tensor], Tensor]] = [
        lambda x: x[:, :8], lambda x: x[:, ::2], lambda x: x[:, :, 1:, :-1], lambda x: x[:, 8:].flip(2),
    ]  # fmt: skip
    return Step(f"slice{i}", lambda x, _: cuts[i](x))


def _shuffle(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    groups = 2 if c % 2 == 0 else 1
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


def _overwritten(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 0] = 0
    y[..., 1:] += x[..., :-1]
    return y.add_(0.5)


def _gate(rng: random.Random, x: Tensor, values: list[Tensor]) -> Step:
    """Squeeze and excitation."""
    channels = x.shape[1]
    layers = nn.Conv2d(channels, 8, 1), nn.Conv2d(8, channels, 1)

    def run(x: Tensor, _: Any, down: nn.Module, up: nn.Module) -> Tensor:
        gate: Tensor = up(F.relu(down(x.mean((2, 3), keepdim=True))))
        return x * gate.sigmoid()

    return Step("gate", run, *layers)


def _pool(rng: random.Random, x: Tensor, values: list[Tensor]) -> Step | None:
    if min(x.shape[2:]) < 3:
        return None
    kinds: list[Callable[[Tensor], Tensor]] = [
        lambda x: F.max_pool2d(x, 3, 2, 1), lambda x: F.avg_pool2d(x, 2), lambda x: F.adaptive_avg_pool2d(x, 3),
        lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False), lambda x: F.adaptive_max_pool2d(x, 4),
        lambda x: F.adaptive_avg_pool2d(x, 1).expand(-1, -1, 4, 4), lambda x: F.lp_pool2d(x.abs() + 1, 2, 2),
    ]  # fmt: skip
    i = rng.randrange(len(kinds))
    return Step(f"pool{i}", lambda x, _: kinds[i](x))


def _resize(rng: random.Random, x: Tensor, values: list[Tensor]) -> Step:
    kinds: list[Callable[[Tensor], Tensor]] = [
        lambda x: F.interpolate(x, scale_factor=2.0), lambda x: F.pad(x, (1, 2, 0, 1)),
        lambda x: F.interpolate(x, (9, 6), mode="bilinear"), lambda x: F.pad(x, (1, 1, 0, 1), mode="circular"),
        lambda x: x.roll((1, -1), (2, 3)), lambda x: F.pad(x, (1, 0, 1, 0), value=0.5),
    ]  # fmt: skip
    i = rng.randrange(len(kinds))
    return Step(f"resize{i}", lambda x, _: kinds[i](x))


def _to_tokens(rng: random.Random, x: Tensor, values: list[Tensor]) -> Step:
    """And often back again, without a copy."""
    linear = nn.Linear(x.shape[1], x.shape[1])
    if rng.random() < 0.4:
        return Step("tokens", lambda x, _: x.flatten(2).transpose(1, 2))
    if rng.random() < 0.5:
        return Step("linear_last", lambda x, _, layer: layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), linear)

    def run(x: Tensor, _: Any, layer: nn.Module) -> Tensor:
        y: Tensor = layer(x.flatten(2).transpose(1, 2))
        return y.transpose(1, 2).reshape(x.shape)

    return Step("tokens_and_back", run, linear)


def _to_image(rng: random.Random, x: Tensor, values: list[Tensor]) -> Step:
    return Step("image", lambda x, _: x.transpose(1, 2).unsqueeze(3))


def _to_vectors(rng: random.Random, x: Tensor, values: list[Tensor]) -> Step:
    kinds: list[Callable[[Tensor], Tensor]] = [
        lambda x: x.mean((2, 3)), lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1), lambda x: x.amax((2, 3)),
    ]  # fmt: skip
    i = rng.randrange(len(kinds))
    return Step(f"vectors{i}", lambda x, _: kinds[i](x))


def _vectors_to_image(rng: random.Random, x: Tensor, values: list[Tensor]) -> Step:
    return Step("vectors_to_image", lambda x, _: x[:, :, None, None].expand(-1, -1, 3, 5))


def _linear(rng: random.Random, x: Tensor, values: list[Tensor]) -> Step:
    return _layer("linear", nn.Linear(x.shape[-1], rng.choice((8, 16)), bias=rng.random() < 0.7))


def _layer_norm(rng: random.Random, x: Tensor, values: list[Tensor]) -> Step:
    return _layer("layer_norm", nn.LayerNorm(x.shape[-1]))


def _attention(rng: random.Random, x: Tensor, values: list[Tensor]) -> Step:
    return Step(
        "attention", lambda x, _, q, k: F.scaled_dot_product_attention(q(x)[:, None], k(x)[:, None], x[:, None])[:, 0],
        nn.Linear(x.shape[-1], 8), nn.Linear(x.shape[-1], 8),
    )  # fmt: skip


def _recurrent(rng: random.Random, x: Tensor, values: list[Tensor]) -> Step | None:
    if x.shape[1] > 20:
        return None
    layer = rng.choice((nn.LSTM, nn.GRU))(x.shape[-1], 8, batch_first=True)
    return Step(type(layer).__name__, lambda x, _, layer: layer(x)[0], layer)


def _along(rng: random.Random, x: Tensor, values: list[Tensor]) -> Step:
    """Operations whose numbers depend on their neighbours in one dimension."""
    kinds: list[Callable[[Tensor], Tensor]] = [
        lambda x: x.softmax(1), lambda x: x.log_softmax(2), lambda x: x.cumsum(1), lambda x: x.tril(),
        lambda x: x.logcumsumexp(3), lambda x: x.sort(1)[0], lambda x: x - x.topk(2, 1)[0][:, :1],
        lambda x: x.flip(1) - x.cummax(2)[0], lambda x: F.normalize(x, dim=1), lambda x: F.local_response_norm(x, 3),
        lambda x: x.triu(1) + x.diagonal(0, 2, 3).mean(), lambda x: F.glu(torch.cat([x, x], 1), 1),
        lambda x: x - x.std((2, 3), keepdim=True),
    ]  # fmt: skip
    i = rng.randrange(len(kinds))
    return Step(f"along{i}", lambda x, _: kinds[i](x))


def _softmax(rng: random.Random, x: Tensor, values: list[Tensor]) -> Step:
    return Step("softmax", lambda x, _: torch.bmm(torch.softmax(x @ x.transpose(1, 2), -1), x))


_IMAGE_STEPS = [
    _normal, _depthwise, _depthwise, _pointwise, _pointwise, _separable, _residual, _norm, _norm, _activation,
    _activation, _combine, _combine, _combine, _halves, _slice, _gate, _pool, _resize, _to_tokens, _to_vectors, _along,
    _plain("shuffle", _shuffle), _plain("overwritten", _overwritten),
    _plain("turned", lambda x: x.transpose(2, 3).contiguous()), _plain("turned_view", lambda x: x.transpose(2, 3)),
    _plain("copied", lambda x: x.contiguous(memory_format=torch.channels_last)),
    _plain("scaled", lambda x: x * 0.5 + 1),
]  # fmt: skip
_TOKEN_STEPS = [
    _linear, _layer_norm, _activation, _attention, _softmax, _recurrent, _combine, _to_image, _to_image,
    _plain("first_token", lambda x: torch.cat([x[:, -1:], x[:, :-1]], 1)),
]  # fmt: skip
_VECTOR_STEPS = [_linear, _activation, _combine, _vectors_to_image, _vectors_to_image]
