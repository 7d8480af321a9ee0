"""How many bytes a compiled network's weights take: what explain says of each step, and rows of a run's page."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sepconv import quantize
from sepconv.compile import compile
from sepconv.kernels.halide.jit import runtime
from sepconv.runs.precisions import InPrecision, weight_bytes

lower: Any = importlib.import_module("sepconv.compile.lower")
choice: Any = importlib.import_module("sepconv.compile.passes.precision")
prepare: Any = importlib.import_module("sepconv.compile.prepare")

pytestmark = pytest.mark.skipif(bool(runtime.missing()), reason=runtime.missing() or "")


def _three_layers() -> nn.Module:
    """A stem, a depthwise layer whose norm becomes a bias, and a layer of 16 to 8 channels."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, bias=False),
        nn.Conv2d(16, 16, 3, groups=16, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 8, 1),
    ).eval()


def _by_name(model: nn.Module, x: Tensor, **options: Any) -> dict[str, int]:
    explained = compile(model, x, **options).explain()
    assert explained.weight_bytes == sum(group.weight_bytes for group in explained.groups)
    return {group.name: group.weight_bytes for group in explained.groups if group.name}


def test_weights_of_float32_take_four_bytes_and_norms_none_of_their_own() -> None:
    found = _by_name(_three_layers(), torch.randn(1, 3, 12, 12))
    assert found == {"0": 4 * 432, "1": 4 * (144 + 16), "5": 4 * (128 + 8)}


def test_weights_that_two_steps_share_count_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.conv(x).relu())

    explained = compile(Twice().eval(), torch.randn(1, 4, 5, 5)).explain()
    assert [group.weight_bytes for group in explained.groups] == [4 * 20, 0]


def test_whole_numbers_take_one_byte_and_their_scales_four() -> None:
    model, x = _three_layers(), torch.randn(8, 3, 12, 12)
    found = _by_name(quantize(model, x, force=True)[0], x[:1])
    # Biases are whole numbers of 32 bits.
    assert found["1"] == 144 + 4 * 16 + 4 * 16
    assert found["5"] == 128 + 4 * 8 + 4 * 8


def test_a_layer_left_in_float32_keeps_four_bytes() -> None:
    model, x = _three_layers(), torch.randn(8, 3, 12, 12)
    found = _by_name(quantize(model, x, force=True, skip=["5"])[0], x[:1])
    assert found["5"] == 4 * (128 + 8)


def test_without_kernels_weights_are_those_that_pytorch_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lower, "_kernels", lambda *_: ())
    found = _by_name(_three_layers(), torch.randn(1, 3, 12, 12))
    assert found == {"0": 4 * 432, "1": 4 * (144 + 16), "5": 4 * (128 + 8)}


def test_a_matrix_that_pytorch_multiplies_by_counts() -> None:
    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 6))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cdist(x, self.weight)

    explained = compile(Sorted().eval(), torch.randn(1, 3, 6)).explain()
    assert "torch" in {group.kernel for group in explained.groups}
    assert explained.weight_bytes == 4 * 24


def test_rows_of_a_page_count_what_runs() -> None:
    model, x = _three_layers(), torch.randn(8, 3, 12, 12)
    quantized = quantize(model, x, force=True)[0]
    for module in (model, quantized):
        run = compile(module, x[:1])
        assert weight_bytes(InPrecision("separable", "any", module, run)) == run.explain().weight_bytes


def test_a_network_that_stays_in_float32_counts_so_whatever_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "missing", lambda precision: "not here" if precision == "bfloat16" else "")
    model, x = _three_layers(), torch.randn(1, 3, 12, 12)
    run = compile(model, x, precision="bfloat16")
    assert run.explain().note == "not here"
    assert weight_bytes(InPrecision("separable", "bfloat16", model, run)) == 4 * (432 + 160 + 136)


def test_what_pytorch_runs_counts_as_the_module_keeps_it() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) if float(x.sum()) > 0 else x

    model, x = Branching().eval(), torch.rand(1, 3, 4, 4)
    with pytest.warns(UserWarning, match="through PyTorch"):
        run = compile(model, x)
    assert weight_bytes(InPrecision("separable", "bfloat16", model, run)) == 4 * 16
