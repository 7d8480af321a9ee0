"""A compiled network as plain data: what is computed from what, in which numbers, with no memory in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass

import pytest
import torch
from networks import NETWORKS, SamePadded, randomise
from torch import Tensor, nn
from torch._ops import OpOverload

from sepconv.compile import CompiledModel, compile
from sepconv.compile.groups import Convolution, Epilogue, SeparableGroup
from sepconv.compile.network import PreparedNetwork
from sepconv.compile.numbers import FLOAT32, NumberType, not_computed
from sepconv.compile.store import Constant
from sepconv.compile.verify import AGREEMENT, agreement

PLAIN = (int, float, str, type(None), torch.dtype, torch.device, torch.memory_format, torch.layout, OpOverload)


def network_of(compiled: CompiledModel) -> PreparedNetwork:
    network = next(iter(compiled._networks.values()))
    assert isinstance(network, PreparedNetwork)
    return network


def leaves(value: object) -> Iterator[object]:
    """All that a record is made of, down to what has no parts; constants stand for themselves."""
    if is_dataclass(value):
        for field in fields(value):
            yield from leaves(getattr(value, field.name))
    elif isinstance(value, Mapping):
        for part in value.items():
            yield from leaves(part)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from leaves(part)
    else:
        yield value


class Several(nn.Module):
    """Images, whole numbers and truth values on its edges, and an operation with several results."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.table = nn.Conv2d(8, 8, 1), nn.Embedding(8, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.conv(x)
        most, where = y.flatten(2).max(2)
        return self.table(where.remainder(8)), torch.where(most > 0, most, -most)


@pytest.mark.parametrize("name", ["mobilenet_v2", "squeeze_excite", "strided", "several"])
def test_program_holds_no_memory(name: str) -> None:
    make, inputs = NETWORKS[name]
    network = network_of(compile(randomise(make()), inputs()))
    for part in (network.program, network.arena):
        strange = [leaf for leaf in leaves(part) if not isinstance(leaf, (*PLAIN, Constant))]
        assert strange == []


def test_program_says_the_same_wherever_it_was_made() -> None:
    """Addresses would differ from one to the other."""
    model, x = randomise(SamePadded()), torch.randn(1, 3, 17, 22)
    first, second = (network_of(compile(model, x)) for _ in range(2))
    assert str(first.program) == str(second.program)
    assert first.arena == second.arena
    assert str(first.program).splitlines() == [
        "inputs m0:float32[1x3x17x22]",
        "m1:float32[1x8x9x11] = normal conv_stem(m0:float32[1x3x17x22])",
        "m2:float32[1x16x5x6] = separable dw + pw(m1:float32[1x8x9x11])",
        "outputs m2:float32[1x16x5x6]",
    ]


@pytest.mark.parametrize("name", ["mobilenet_v2", "strided", "near_misses", "whole numbers"])
def test_program_has_a_number_type_on_every_edge(name: str) -> None:
    make, inputs = NETWORKS.get(name, (Several, lambda: torch.randn(2, 8, 5, 5)))
    network = network_of(compile(randomise(make()), inputs()))
    instance = network.take()
    edges = [place for place in network.program.places if not _unused(network, place.memory)]
    assert edges
    for place in edges:
        assert isinstance(place.form.number, NumberType)
        assert instance.tensor(place, 0 if network.arena.slices.steps else None).dtype is place.form.number.storage
    groups = [step for step in network.program.steps if step.group is not None]
    assert {place.form.number for step in groups for place in (*step.inputs, *step.outputs)} <= {FLOAT32}
    if name == "whole numbers":
        assert {place.form.number.storage for place in edges} == {torch.float32, torch.int64, torch.bool}


def _unused(network: PreparedNetwork, memory: int | Constant) -> bool:
    """An input that is read where the caller holds it has no memory."""
    return isinstance(memory, int) and not network.arena.regions[memory].bytes


class Ended(nn.Module):
    """Each kind of convolution with all that may follow it in one pass."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise, self.pointwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.Conv2d(8, 8, 1)
        self.norm, self.linear = nn.BatchNorm2d(8), nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(x + self.pointwise(nn.functional.relu6(self.norm(self.depthwise(x)))))
        z = y.mean((2, 3))
        return self.linear(z) + z


def test_groups_have_one_epilogue() -> None:
    program = network_of(compile(randomise(Ended()), torch.randn(2, 8, 7, 7))).program
    separable, _, linear = (step.group for step in program.steps if step.group is not None)
    assert isinstance(separable, SeparableGroup)
    assert isinstance(linear, Convolution)
    inner, outer = separable.depthwise.epilogue, separable.epilogue
    assert (inner.residual, inner.activation, inner.bias is None) == (False, "relu6", False)
    assert (outer.residual, outer.activation, outer.bias is None) == (True, "relu", False)
    assert separable.epilogue is separable.pointwise.epilogue
    assert linear.epilogue == Epilogue(None, residual=True)


def test_epilogue_computes_in_its_order() -> None:
    x, residual = torch.tensor([-3.0, 1.0]), torch.tensor([1.0, -2.0])
    assert Epilogue(activation="relu")(x, None).tolist() == [0.0, 1.0]
    assert Epilogue(residual=True, activation="relu")(x, residual).tolist() == [0.0, 0.0]
    assert Epilogue(residual=True)(x, residual).tolist() == [-2.0, -1.0]
    assert Epilogue().is_linear
    assert not Epilogue(residual=True).is_linear
    assert not Epilogue(activation="relu").is_linear


class Wide(nn.Module):
    """A part in numbers of 64 bits, which no kernel of ours computes with."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.conv = what, nn.Conv2d(8, 8, 1)
        self.weight = [torch.randn(8, 8, 1, 1, dtype=torch.float64)]  # no parameter: the model stays in float32

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.what == "weights":
            return nn.functional.conv2d(y.double(), self.weight[0])
        return y.double().mean((2, 3)) if self.what == "image" else y + x.double()


@pytest.mark.parametrize(
    ("what", "kind", "says"),
    [
        ("weights", "aten.convolution.default", "the weights are torch.float64"),
        ("image", "aten.mean.dim", "the image is torch.float64"),
        ("residual", "aten.add.Tensor", "what is added is torch.float64"),
    ],
)
def test_explain_says_which_numbers_are_not_computed(what: str, kind: str, says: str) -> None:
    model, x = Wide(what).eval(), torch.randn(1, 8, 5, 5)
    fast = compile(model, x)
    [group] = [group for group in fast.explain().groups if group.kind == kind]
    assert (group.kernel, group.reason) == ("torch", f"the kernels compute in float32 and {says}")
    torch.testing.assert_close(fast(x), model(x))


def test_number_types_tell_scales_apart() -> None:
    scaled = NumberType(torch.uint8, 0.5, 3)
    assert str(scaled) == "uint8 x 0.5 from 3"
    assert dataclasses.replace(scaled, scale=0.25) != scaled
    assert not_computed([FLOAT32], "the image is") == ""
    assert (
        not_computed([FLOAT32, scaled], "the image is") == "the kernels compute in float32 and the image is torch.uint8"
    )


def test_agreement_is_that_of_the_coarsest_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    half, whole = NumberType(torch.bfloat16), NumberType(torch.int64)
    assert agreement([FLOAT32, whole]) == agreement([]) == AGREEMENT[torch.float32]
    monkeypatch.setitem(AGREEMENT, torch.bfloat16, 0.05)
    assert agreement([FLOAT32, half]) == 0.05


def test_pixels_made_of_channels_are_one_copy() -> None:
    model = nn.Sequential(nn.Conv2d(3, 27, 1), nn.PixelShuffle(3), nn.ReLU(), nn.PixelUnshuffle(3), nn.Conv2d(27, 5, 1))
    x = torch.randn(2, 3, 5, 7)
    fast = compile(model.eval(), x)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
    assert not any(group.kind.startswith("aten") for group in fast.explain().groups)
    volume = nn.PixelShuffle(2).eval()
    x = torch.randn(8, 5, 7)
    torch.testing.assert_close(compile(volume, x)(x), volume(x))
