"""``torch.compile(model, backend="sepconv")``."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from importlib.metadata import entry_points

import pytest
import torch
from networks import SamePadded, randomise
from torch import Tensor, nn

from sepconv.compile import backend as backends
from sepconv.compile.backend import backend, explain_graphs

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch.compiler.reset()
    gc.collect()
    backends._graphs.clear()
    yield
    torch.compiler.reset()


def close(result: Tensor, truth: Tensor) -> None:
    torch.testing.assert_close(result, truth, rtol=1e-5, atol=1e-5)


def test_backend_is_found_by_its_name() -> None:
    [found] = entry_points(group="torch_dynamo_backends", name="sepconv")
    assert found.load() is backend


def test_backend_equals_the_model_at_every_size() -> None:
    model = randomise(SamePadded())
    fast = torch.compile(model, backend="sepconv")
    with torch.no_grad():
        for shape in ((1, 3, 17, 22), (2, 3, 17, 22), (3, 3, 20, 23)):
            x = torch.randn(shape)
            close(fast(x), model(x))
    assert {group.kind for e in explain_graphs() for group in e.groups} == {"normal", "separable"}
    assert {group.kernel for e in explain_graphs() for group in e.groups} == {"halide"}


def test_backend_takes_a_precision() -> None:
    model, x = randomise(SamePadded()), torch.randn(1, 3, 17, 22)
    fast = torch.compile(model, backend="sepconv", options={"precision": "bfloat16"})
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=0.05, atol=0.05)
    [explanation] = explain_graphs()
    assert explanation.precision == "bfloat16" or explanation.note or any(g.reason for g in explanation.groups)
    with pytest.raises(TypeError, match="sepconv: precision must be a name or None, got int"):
        backend(torch.fx.symbolic_trace(nn.ReLU()), [x], options={"precision": 16})
    with pytest.raises(ValueError, match=r"""sepconv: the only option is "precision", got \['speed'\]"""):
        backend(torch.fx.symbolic_trace(nn.ReLU()), [x], options={"speed": 2})


def test_backend_sees_changed_weights() -> None:
    model, x = randomise(SamePadded()), torch.randn(1, 3, 17, 22)
    fast = torch.compile(model, backend=backend)
    with torch.no_grad():
        close(fast(x), model(x))
        model.pw.weight.mul_(2)
        close(fast(x), model(x))
        model.load_state_dict(copy.deepcopy(randomise(SamePadded())).state_dict())
        close(fast(x), model(x))


def test_backend_leaves_gradients_to_pytorch() -> None:
    model, x = randomise(SamePadded()), torch.randn(1, 3, 17, 22)
    fast = torch.compile(model, backend=backend)
    with pytest.warns(UserWarning, match="sepconv: a graph needs gradients and runs through PyTorch"):
        result = fast(x)
    result.sum().backward()
    grad = model.pw.weight.grad
    assert grad is not None
    model.zero_grad()
    model(x).sum().backward()
    close(grad, model.pw.weight.grad)
    assert explain_graphs() == []


class Decides(nn.Module):
    """A decision on values in the middle: two graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, groups=8)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = torch.relu(self.first(x))
        if y.sum() > 0:
            y = y + 1
        return {"y": self.second(y), "x": x}


def test_backend_speeds_up_what_lies_around_a_decision() -> None:
    model, x = Decides().eval(), torch.randn(1, 3, 9, 8)
    fast = torch.compile(model, backend=backend)
    with torch.no_grad():
        result = fast(x)
        close(result["y"], model(x)["y"])
    assert result["x"] is x
    kinds = [[group.kind for group in explained.groups] for explained in explain_graphs()]
    assert sorted(kind for graph in kinds for kind in graph if "." not in kind) == [
        "depthwise",
        "elementwise",
        "normal",
        "sum",
    ]


def test_backend_says_why_a_graph_runs_through_pytorch() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).train(), torch.randn(2, 3, 9, 8)
    fast = torch.compile(model, backend=backend)
    plain = copy.deepcopy(model)
    with (
        torch.no_grad(),
        pytest.warns(UserWarning, match="a graph runs through PyTorch: .*it changes a parameter, a buffer"),
    ):
        close(fast(x), plain(x))
    close(model[1].running_mean, plain[1].running_mean)


class _Weighted(nn.Module):
    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return torch.conv2d(x, weight)


def test_backend_sees_another_weight_at_the_address_of_one_that_is_gone() -> None:
    """Neither has been changed since it was made; weights with gaps are copied, so that nothing holds their memory."""
    module = torch.fx.symbolic_trace(_Weighted())
    place = next(node for node in module.graph.nodes if node.name == "weight")
    place.meta["tensor_dict"] = {"_dynamo_static_input_type": "parameter"}
    graph = backends.Graph(module, [])
    x, memory = torch.randn(1, 8, 5, 7), torch.zeros(8, 16, 1, 1).numpy()
    with torch.no_grad():
        for number in (1.0, 2.0, 3.0):
            memory[:] = number
            weight = torch.from_numpy(memory)[:, ::2]
            close(graph(x, weight), torch.conv2d(x, weight))
