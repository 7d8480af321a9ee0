"""Compiled networks compute what the model computes in float64, whoever wrote them, and by the kernels they should."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import NETWORKS, Converted, ConvNeXtBlock, SamePadded, Several, randomise
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sepconv.compile import CompiledModel, compile
from sepconv.compile.groups import Convolution, SeparableGroup
from sepconv.kernels.halide.jit.machine_code import Chain
from sepconv.kernels.torch import aten
from sepconv.models import MobileNetV2

RELATIVE = 1e-5


def double(value: Any) -> Any:
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.double() if floating else value


def assert_equals_model(compiled: CompiledModel, model: nn.Module, inputs: tuple[Any, ...]) -> None:
    with torch.no_grad():
        truth = copy.deepcopy(model).double()(*map(double, inputs))
        eager = model(*inputs)
    result = compiled(*inputs)
    assert pytree.tree_structure(result) == pytree.tree_structure(truth)
    for ours, exact, plain in zip(*map(pytree.tree_leaves, (result, truth, eager)), strict=True):
        if not isinstance(exact, Tensor):
            assert ours == exact
            continue
        assert ours.dtype == plain.dtype
        assert ours.stride() == plain.stride()
        if exact.is_floating_point():
            assert (ours - exact).abs().max() <= RELATIVE * exact.abs().max()
        else:
            assert torch.equal(ours, exact)


def kinds(compiled: CompiledModel) -> Counter[str]:
    return Counter(group.kind for group in compiled.explain().groups)


@pytest.mark.parametrize("name", NETWORKS)
def test_compile_equals_float64(name: str) -> None:
    make, inputs = NETWORKS[name]
    model = randomise(make())
    example = inputs()
    compiled = compile(model, example)
    assert compiled.explain().reason == ""
    assert_equals_model(compiled, model, example)
    assert_equals_model(compiled, model, inputs())


def test_compile_channels_last_input_and_output() -> None:
    model = randomise(ConvNeXtBlock())
    x = torch.randn(2, 8, 9, 7)
    compiled = compile(model, x)
    assert_equals_model(compiled, model, (x.contiguous(memory_format=torch.channels_last),))
    gaps = torch.randn(2, 9, 8, 14)[..., ::2].transpose(1, 2)
    assert torch.equal(compiled(gaps), compiled(gaps.contiguous()))
    model = randomise(SamePadded())
    compiled = compile(model, torch.randn(2, 3, 17, 22))
    assert_equals_model(compiled, model, (torch.randn(2, 3, 17, 22).contiguous(memory_format=torch.channels_last),))
    assert_equals_model(compiled, model, (torch.randn(2, 3, 17, 44)[..., ::2],))


def test_compile_takes_weights_laid_out_for_training() -> None:
    """After training with channels_last weights, global pooling would change strides in place."""
    model: Any = randomise(MobileNetV2(0.1, num_classes=7))
    model.to(memory_format=torch.channels_last)
    x = torch.randn(1, 3, 37, 64)
    compiled = compile(model, x)
    assert compiled.explain().reason == ""
    assert_equals_model(compiled, model, (x,))
    assert model.features[0][0].weight.is_contiguous(memory_format=torch.channels_last)


def test_compile_follows_batch_and_image_size() -> None:
    model = randomise(SamePadded())
    compiled = compile(model, torch.randn(1, 3, 16, 16))
    for shape in ((1, 3, 16, 17), (3, 3, 33, 16), (1, 3, 1, 2), (2, 3, 7, 7)):
        assert_equals_model(compiled, model, (torch.randn(shape),))


def test_compile_mobilenet_v2_is_made_of_whole_groups() -> None:
    compiled = compile(randomise(MobileNetV2(0.1, num_classes=7)), torch.randn(1, 3, 37, 64))
    assert kinds(compiled) == {"normal": 1, "separable": 17, "pointwise": 17, "pool": 1, "linear": 1}
    explained = compiled.explain()
    assert {group.kernel for group in explained.groups} == {"halide"}
    assert sum("add" in group.fused for group in explained.groups) == 11
    assert [g.name for g in explained.groups][:2] == ["features.0.0", "features.1.conv.0.0 + features.1.conv.1"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "same_padded",
            {"normal": ("pad", "norm", "relu6"), "separable": ("pad", "norm", "relu6", "pointwise", "norm", "relu6")},
        ),
        ("converted", {"separable": ("pointwise", "norm", "relu")}),
        ("squeeze_excite", {"depthwise": ("norm", "hardswish"), "pool": (), "pointwise": ("relu",)}),
        ("convnext_block", {"depthwise": (), "linear": ("gelu",)}),
    ],
)  # fmt: skip
def test_compile_fuses(name: str, expected: dict[str, tuple[str, ...]]) -> None:
    make, inputs = NETWORKS[name]
    first: dict[str, tuple[str, ...]] = {}
    for group in compile(randomise(make()), inputs()).explain().groups:
        first.setdefault(group.kind, group.fused)
    assert {kind: first[kind] for kind in expected} == expected


def test_compile_linear_layers_take_layer_scale_and_residual() -> None:
    groups = compile(randomise(ConvNeXtBlock()), torch.randn(2, 8, 9, 7)).explain().groups
    assert [g.fused for g in groups if g.kind == "linear"] == [("gelu",), ("scale", "add")]
    assert {g.kernel for g in groups} <= {"halide", "copy"}


def test_compile_residual_behind_a_separable_convolution() -> None:
    groups = compile(randomise(Converted()), torch.randn(2, 8, 11, 13)).explain().groups
    assert groups[-1].fused == ("pointwise", "add", "relu")


def test_compile_takes_keyword_arguments() -> None:
    model = randomise(Several())
    inputs = {"image": torch.randn(2, 3, 9, 7), "features": torch.randn(2, 8, 9, 7)}
    result, truth = compile(model, inputs)(**inputs), model(**inputs)
    torch.testing.assert_close(result["maps"][0], truth["maps"][0])
    assert result["count"] == 3
    assert result["image"].data_ptr() != inputs["image"].data_ptr()


@pytest.mark.parametrize("name", ["mobilenet_v2", "converted", "strided", "convnext_block"])
def test_compile_groups_round_like_single_layers(name: str, assert_rounding: Any) -> None:
    """Every group against its own inputs: errors of one layer cannot hide behind the others."""
    make, inputs = NETWORKS[name]
    compiled = compile(randomise(make()), inputs())
    network = next(iter(compiled._networks.values()))
    assert not isinstance(network, str)
    instance, given = network.take(), [x for x in inputs() if isinstance(x, Tensor)]
    instance.run(given)
    checked = 0
    for i, step in enumerate(network.program.steps):
        if not isinstance(step.group, Convolution | SeparableGroup) or network.program.is_direct(i):
            continue
        for place in step.inputs:
            instance.tensor(place).normal_()
        args = [instance.tensor(place).clone() for place in step.inputs]
        out = instance.tensor(step.outputs[0]).fill_(float("nan"))
        instance.calls[i].run()
        truth, magnitude = in_double(step.group, args, torch.Tensor.double), in_double(step.group, args, absolute)
        assert_rounding(out, truth, magnitude + truth.abs(), terms=64)
        checked += 1
    assert checked >= 2


def absolute(x: Tensor) -> Tensor:
    return x.double().abs()


def in_double(group: Any, args: list[Tensor], of: Any) -> Tensor:
    """A group in float64, of the values themselves (with activations) or of their magnitudes (without)."""
    if isinstance(group, SeparableGroup):
        return in_double(group.pointwise, [in_double(group.depthwise, args[:1], of), *args[1:]], of)
    end = group.epilogue
    weight, bias = of(group.weight.tensor), None if end.bias is None else of(end.bias.tensor)
    activation = end.activation if of is torch.Tensor.double else ""
    x, residual = of(args[0]), of(args[1]) if end.residual else 0.0
    if group.dims == 0:
        y = nn.functional.linear(x, weight, bias)
    else:
        y = aten.conv(x, weight, bias, group.geometry, groups=group.groups)
    return aten.ACTIVATIONS[activation].function(y + residual)


class RandomNetwork(nn.Module):
    """Blocks of (kernel, stride, activation, expansion, out channels); a residual wherever the sizes allow one."""

    def __init__(self, blocks: list[tuple[int, int, int, bool, int]]) -> None:
        super().__init__()
        activations = [nn.ReLU(), nn.ReLU6(inplace=True), nn.SiLU(), nn.Identity()]
        self.blocks = nn.ModuleList()
        channels = 8
        for kernel, stride, activation, expands, out_channels in blocks:
            act, hidden = activations[activation], 16 if expands else channels
            layers: list[nn.Module] = []
            if expands:
                layers += [nn.Conv2d(channels, hidden, 1, bias=False), nn.BatchNorm2d(hidden), act]
            layers += [
                nn.Conv2d(hidden, hidden, kernel, stride, kernel // 2, groups=hidden),
                nn.BatchNorm2d(hidden),
                act,
            ]
            layers += [nn.Conv2d(hidden, out_channels, 1), nn.BatchNorm2d(out_channels)]
            self.blocks.append(nn.Sequential(*layers))
            channels = out_channels

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            y = block(x)
            x = x + y if x.shape == y.shape else y
        return x


BLOCK = st.tuples(
    st.sampled_from([3, 5]), st.integers(1, 2), st.integers(0, 3), st.booleans(), st.sampled_from([8, 16])
)


@pytest.mark.slow
@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(
    blocks=st.lists(BLOCK, min_size=1, max_size=3),
    height=st.integers(1, 19),
    width=st.integers(1, 19),
    batch=st.integers(1, 3),
)
def test_compile_random_separable_networks(blocks: Any, height: int, width: int, batch: int) -> None:
    model = randomise(RandomNetwork(blocks))
    x = torch.randn(batch, 8, height, width)
    compiled = compile(model, x)
    assert "separable" in kinds(compiled)
    assert {group.kernel for group in compiled.explain().groups} == {"halide"}
    assert_equals_model(compiled, model, (x,))


def test_kernels_of_a_network_run_without_a_return_to_python() -> None:
    make, inputs = NETWORKS["mobilenet_v1"]
    fast = compile(make().eval(), inputs())
    instance = next(iter(fast._networks.values())).take()  # type: ignore[union-attr]
    # The stem reads the caller's own image; the thirteen blocks, pooling and classifier follow in one call.
    (_, direct), (rest, _) = instance._chains
    assert direct
    assert isinstance(rest, Chain)
    assert len(rest.bound) >= 15
