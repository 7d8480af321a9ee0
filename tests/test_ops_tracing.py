"""Tracers, scripts and exporters see PyTorch's own operators, and their results agree."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import sepconv
from sepconv import models

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit")  # PyTorch would like it to be forgotten


class _Functions(nn.Module):
    """The functions inside of somebody's module, each with everything that it can do."""

    def __init__(self) -> None:
        super().__init__()
        self.filters, self.mix = nn.Parameter(torch.randn(8, 1, 3, 2)), nn.Parameter(torch.randn(8, 8, 1, 1))
        self.bias = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        y = sepconv.depthwise_conv2d(x, self.filters, self.bias, 1, "same", (1, 2), activation="hardswish")
        y = sepconv.pointwise_conv2d(y, self.mix, residual=y, activation="gelu")
        y = sepconv.separable_conv2d(y, self.filters, self.mix, self.bias, padding=1, activation="relu6")
        return sepconv.pointwise_conv2d(y[0], self.mix, stride=2)


def _three(layer: Any, *arguments: Any, **options: Any) -> dict[str, nn.Module]:
    return {f"{layer}{d}d": getattr(sepconv, f"{layer}{d}d")(*arguments, **options) for d in (1, 2, 3)}


_PADDINGS: list[dict[str, Any]] = [
    {"padding": "same", "dilation": 2},
    {"padding": "valid"},
    {"padding": 2, "stride": 2},
    {"padding": 1, "padding_mode": "reflect"},
    {"padding": "same", "padding_mode": "circular"},
    {"padding": 1, "padding_mode": "replicate", "bias": False},
]
_NORMS = {"norm": "batch", "activation": "silu", "pointwise_layers": 2}
_MODELS: dict[str, nn.Module] = {
    **_three("DepthwiseConv", 4, 3, padding=1, depth_multiplier=2),
    **{f"DepthwiseConv2d {o}": sepconv.DepthwiseConv2d(4, (4, 3), **o) for o in _PADDINGS},
    **_three("PointwiseConv", 4, 6, stride=2),
    **_three("SeparableConv", 4, 6, 3, padding="same", **_NORMS),
    "SeparableConv2d without norms": sepconv.SeparableConv2d(4, 6, 3, padding=1, activation="relu6"),
    "functions": _Functions(),
    "MobileNetV1": models.MobileNetV1(0.25, num_classes=10),
    "InvertedResidual": models.InvertedResidual(4, 4, stride=1, expand_ratio=2),
}
_LAYERS = [name for name in _MODELS if name not in ("MobileNetV1", "InvertedResidual")]


_IN_FLOAT32 = ("SeparableConv2d", "functions", "InvertedResidual")


def _example(name: str) -> tuple[nn.Module, Tensor]:
    """Most in float64, for which no kernel has to be compiled; in float32 evaluated norms are folded."""
    model = _MODELS[name].eval()
    dtype = torch.float32 if name in _IN_FLOAT32 else torch.float64
    model.to(dtype)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
            nn.init.uniform_(module.running_mean)
    if name.startswith("MobileNet"):
        return model, torch.randn(1, 3, 32, 32, dtype=dtype)
    parameter = next(model.parameters())
    return model, torch.randn(2, 4, *(9, 7, 8)[: parameter.dim() - 2], dtype=dtype)


def _traced(model: nn.Module, x: Tensor) -> tuple[Callable[..., Any], str]:
    trace = torch.jit.trace(model, x)
    return trace, str([node.kind() for node in trace.inlined_graph.nodes()])


def _symbolic(model: nn.Module, x: Tensor) -> tuple[Callable[..., Any], str]:
    graph = torch.fx.symbolic_trace(model)
    return graph, str([node.target for node in graph.graph.nodes])


def _made(model: nn.Module, x: Tensor) -> tuple[Callable[..., Any], str]:
    graph = make_fx(model, tracing_mode="symbolic", _allow_non_fake_inputs=True)(x)
    return graph, str([node.target for node in graph.graph.nodes])


def _exported(model: nn.Module, x: Tensor) -> tuple[Callable[..., Any], str]:
    program = torch.export.export(model, (x,))
    return program.module(), str(program.graph)


_TRACERS = [(trace, name) for trace in (_traced, _symbolic, _made, _exported) for name in _LAYERS]


@pytest.mark.parametrize(
    ("trace", "name"),
    [*_TRACERS, (_symbolic, "MobileNetV1"), *[(trace, "InvertedResidual") for trace in (_traced, _symbolic)]],
)
def test_traces_consist_of_pytorchs_operators(trace: Callable[..., Any], name: str) -> None:
    model, x = _example(name)
    for gradients in (True, False):  # without gradients, evaluated norms are folded
        with torch.set_grad_enabled(gradients):
            run, graph = trace(model, x)
            assert "sepconv::" not in graph
            assert "sepconv." not in graph
            for _ in range(2):
                torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-4)


def test_symbolic_graphs_of_layers_are_those_of_their_modules() -> None:
    """Constants stay constants, and tools that look for activations and norms find them."""
    model = _example("SeparableConv2d")[0]
    nodes = list(torch.fx.symbolic_trace(model).graph.nodes)
    assert [node.args[-1] for node in nodes if node.target is torch.conv2d] == [4, 1, 1]
    called = [node.target for node in nodes if node.op == "call_module"]
    assert called == ["depthwise_norm", "activation", "pointwise_norm", "activation", "pointwise2_norm", "activation"]


@pytest.mark.parametrize("name", _LAYERS)
def test_other_modes(name: str) -> None:
    model, x = _example(name)
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            expected = model(x)
            torch.testing.assert_close(torch.func.functionalize(model)(x), expected, rtol=1e-4, atol=1e-4)
            with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                fake = model(mode.from_tensor(x))
            assert (fake.shape, fake.dtype) == (expected.shape, expected.dtype)


@pytest.mark.parametrize("name", [name for name in _LAYERS if "2d" in name])
def test_compiles_without_graph_breaks(name: str) -> None:
    model, x = _example(name)
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))


@pytest.mark.parametrize("name", [name for name in _LAYERS if "Conv" in name])
def test_scripted_layers(name: str) -> None:
    model, x = _example(name)
    scripted = torch.jit.script(model)
    torch.testing.assert_close(scripted(x), model(x), rtol=1e-4, atol=1e-4)
    assert list(scripted.state_dict()) == list(model.state_dict())
    assert [module.training for module in scripted.modules()] == [False] * len(list(scripted.modules()))
    inside = torch.jit.script(nn.Sequential(model.train()))
    assert inside.training
    assert inside[0].training
    model.eval()


def test_somebodys_own_layer_is_scripted_as_it_is() -> None:
    class Doubled(sepconv.DepthwiseConv2d):
        def forward(self, x: Tensor) -> Tensor:
            return x + x

    torch.testing.assert_close(torch.jit.script(Doubled(4, 3))(torch.ones(1)), torch.tensor([2.0]))


@pytest.mark.filterwarnings("ignore")  # of the old exporter, which says what it thinks of itself
@pytest.mark.parametrize(
    "name", ["DepthwiseConv2d {'padding': 'same', 'dilation': 2}", "functions", "InvertedResidual"]
)
def test_old_onnx_exporter_writes_plain_nodes(name: str) -> None:
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    model, x = _example(name)
    file = io.BytesIO()
    torch.onnx.export(model, (x,), file, dynamo=False)
    nodes = onnx.load_from_string(file.getvalue()).graph.node
    assert {node.domain for node in nodes} == {""}
    assert "Conv" in {node.op_type for node in nodes}


def test_arguments_are_checked_while_traced() -> None:
    x, w = torch.randn(1, 4, 5, 5), torch.randn(6, 1, 3, 3)
    with pytest.raises(ValueError, match="weight has 6 filters"):
        torch.jit.trace(lambda x: sepconv.depthwise_conv2d(x, w), x)
    assert torch._C._get_tracing_state() is None
