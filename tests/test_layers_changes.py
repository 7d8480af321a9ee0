"""Whatever happens to whichever tensor of a layer, the next result is that of the tensors as they are now."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import sepconv
from sepconv.kernels.halide.jit import packing
from sepconv.models.mobilenet_v2 import InvertedResidual


def _norms(*wanted: bool) -> Callable[[int], nn.Module | None]:
    """Batch norms where they are wanted, for one convolution after the other."""
    left = iter(wanted)
    return lambda channels: nn.BatchNorm2d(channels) if next(left) else None


# Large enough that weights are hashed, and small enough that they are compared.
_LAYERS: dict[str, Callable[[], Any]] = {
    "first norm": lambda: sepconv.SeparableConv2d(8, 16, 3, padding=1, norm=_norms(True, False), activation="relu"),
    "second norm": lambda: sepconv.SeparableConv2d(8, 16, 3, padding=1, norm=_norms(False, True), activation="relu"),
    "both norms": lambda: sepconv.SeparableConv2d(64, 96, 3, padding=1, norm="batch", bias=False, depthwise_bias=True),
    "three norms": lambda: sepconv.SeparableConv2d(8, 16, 3, norm=_norms(True, False, True), pointwise_layers=2),
    "no norm": lambda: sepconv.SeparableConv2d(64, 96, 3, padding=1),
    "residual": lambda: InvertedResidual(16, 16, 1, 2),
}


def _lively(layer: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name, tensor in layer.named_buffers():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + (0.5 if name.endswith("var") else -0.5))
    return layer.eval()


def _truth(layer: Any, x: Tensor) -> Tensor:
    """Plain modules of PyTorch with copies of the tensors, in float64."""
    if isinstance(layer, InvertedResidual):
        flat = [[*part] if isinstance(part, nn.Sequential) else [part] for part in layer.conv]
        return x.double() + _plainly([part for parts in flat for part in parts], x)
    more = [f"pointwise{i}" for i in range(2, layer.pointwise_layers + 1)]
    stages = [
        [getattr(layer, n), getattr(layer, f"{n}_norm"), layer.activation] for n in ("depthwise", "pointwise", *more)
    ]
    return _plainly([part for stage in stages for part in stage if part is not None], x)


def _plainly(parts: list[Any], x: Tensor) -> Tensor:
    def double(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().clone().double()

    y = x.double()
    for m in parts:
        if isinstance(m, nn.BatchNorm2d):
            y = nn.functional.batch_norm(y, *map(double, (m.running_mean, m.running_var, m.weight, m.bias)), eps=m.eps)
        elif isinstance(m, nn.Conv2d):
            y = nn.functional.conv2d(y, double(m.weight), double(m.bias), m.stride, m.padding, m.dilation, m.groups)
        else:
            y = m(y)
    return y


class Subject:
    """A layer, one of whose tensors is to be changed."""

    def __init__(self, layer: Any, dice: random.Random) -> None:
        self.layer, self.dice = layer, dice
        names = [name for name, tensor in layer.state_dict().items() if tensor.is_floating_point()]
        self.name = dice.choice(sorted(names))
        path, _, self.leaf = self.name.rpartition(".")
        self.owner = layer.get_submodule(path)

    @property
    def tensor(self) -> Tensor:
        return getattr(self.owner, self.leaf)

    def other(self) -> Tensor:
        """Other numbers, of which those of a variance are positive."""
        return torch.rand(self.tensor.shape) + (0.5 if self.leaf == "running_var" else -0.5)

    def put(self, tensor: Tensor) -> None:
        """Another tensor in its place; what was there is gone."""
        is_parameter = self.leaf in self.owner._parameters
        setattr(self.owner, self.leaf, nn.Parameter(tensor) if is_parameter else tensor)


def _in_place(s: Subject) -> None:
    with torch.no_grad():
        s.tensor.copy_(s.other())


def _one_number(s: Subject) -> None:
    s.tensor.data.view(-1)[s.dice.randrange(s.tensor.numel())] += 0.5


def _swap(s: Subject) -> None:
    other = nn.Parameter(s.other()) if isinstance(s.tensor, nn.Parameter) else s.other()
    torch.utils.swap_tensors(s.tensor, other)


def _load(s: Subject, assign: bool) -> None:
    s.layer.load_state_dict({**s.layer.state_dict(), s.name: s.other()}, assign=assign)


def _optimize(s: Subject, make: Callable[..., torch.optim.Optimizer], **options: Any) -> None:
    parameters = list(s.layer.parameters())
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    make(parameters, lr=0.1, **options).step()
    s.layer.zero_grad()


def _inference(s: Subject) -> None:
    """A tensor without a version, changed in place, and an ordinary one again."""
    with torch.inference_mode():
        s.put(s.other())
        _check(s.layer, s.dice)
        s.tensor.copy_(s.other())
        _check(s.layer, s.dice)
    s.put(s.other())


def _gaps(s: Subject) -> None:
    """Every second number of a larger tensor."""
    s.put(torch.stack([s.other(), s.other()], -1)[..., 1])


class _Turned(nn.Module):
    def forward(self, tensor: Tensor) -> Tensor:
        return tensor.flip(0)


def _parametrize(s: Subject) -> None:
    """On, looked at, and off again, which leaves the values."""
    if s.leaf in s.owner._parameters:
        parametrize.register_parametrization(s.owner, s.leaf, _Turned())
        _check(s.layer, s.dice)
        parametrize.remove_parametrizations(s.owner, s.leaf)


def _there_and_back(s: Subject) -> None:
    _in_place_anyhow(s)
    s.layer.double().float()


def _in_place_anyhow(s: Subject) -> None:
    s.tensor.data = s.other()


def _copied(s: Subject) -> Any:
    made = copy.deepcopy(s.layer)
    _check(made, s.dice)
    return made


_CHANGES: dict[str, Callable[[Subject], Any]] = {
    "in place": _in_place,
    "one number": _one_number,
    "data": lambda s: s.tensor.data.mul_(1.5),
    "other data": _in_place_anyhow,
    "numpy": lambda s: s.tensor.detach().numpy().__imul__(0.5),
    "another tensor": lambda s: s.put(s.other()),
    "a view": lambda s: s.put(torch.cat([s.other(), s.other()])[s.tensor.shape[0] :]),
    "gaps": _gaps,
    "state_dict": lambda s: _load(s, False),
    "state_dict, assigned": lambda s: _load(s, True),
    "sgd": lambda s: _optimize(s, torch.optim.SGD),
    "adam, fused": lambda s: _optimize(s, torch.optim.Adam, fused=True),
    "swap_tensors": _swap,
    "inference tensor": _inference,
    "parametrize": _parametrize,
    "dtype and back": _there_and_back,
    "channels_last": lambda s: s.layer.to(memory_format=torch.channels_last),
    "deepcopy": _copied,
    "epsilon": lambda s: setattr(s.owner, "eps", s.dice.uniform(1e-5, 0.5)),
    "nothing": lambda s: None,
}


def _check(layer: Any, dice: random.Random) -> None:
    first = layer.depthwise if hasattr(layer, "depthwise") else next(m for m in layer.modules() if hasattr(m, "stride"))
    sides = dice.choice([(9, 11), (4, 4)])
    x = torch.randn(2, first.in_channels, *sides).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        torch.testing.assert_close(layer(x).double(), _truth(layer, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", _LAYERS)
def test_no_result_is_that_of_earlier_tensors(kind: str, seed: int) -> None:
    torch.manual_seed(seed)
    dice = random.Random(f"{kind} {seed}")
    layer: Any = _lively(_LAYERS[kind]())
    _check(layer, dice)
    for step in range(25):
        change = dice.choice(list(_CHANGES))
        subject = Subject(layer, dice)
        layer = _CHANGES[change](subject) if change == "deepcopy" else (_CHANGES[change](subject), layer)[1]
        try:
            _check(layer, dice)
        except AssertionError as error:
            raise AssertionError(f"step {step}, {change} of {subject.name}: {error}") from error


@pytest.mark.parametrize("kind", ["first norm", "second norm"])
def test_folded_weights_at_an_old_address_are_packed_again(kind: str) -> None:
    """With only one of a layer's weights made anew, at an address where one lay that is gone."""
    dice = random.Random(0)
    for _ in range(30):
        layer: Any = _lively(_LAYERS[kind]())
        for _ in range(4):
            for norm in [m for m in layer.modules() if isinstance(m, nn.BatchNorm2d)]:
                norm.running_mean.normal_()
            _check(layer, dice)


def test_a_constant_at_the_address_of_another_is_another() -> None:
    """Also where the weight that was given first lives on."""
    weight, memory = torch.zeros(3), torch.zeros(5)
    packed = []
    for number in range(3):
        memory.fill_(number)
        constant = packing.constant(memory.view(5))
        packed += packing.remembered((weight, constant), "sum", lambda constant=constant: [float(constant.sum())])
    assert packed == [0, 5, 10]
