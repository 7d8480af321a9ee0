"""Contenders that run a PyTorch module in memory in bfloat16 and in integers: PyTorch in several ways, and sepconv.

All take and give float32: what turns it into shorter numbers and back is part of the call.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sepconv.bench.peers.pytorch import folded
from sepconv.bench.peers.source import Contender, Network

_INDUCTOR = ("torch._inductor.compile_fx",)
_OURS = ("sepconv.compile", "halide")
_BF16, _INT8 = "bfloat16", "int8"


class _Converted(nn.Module):
    """A module whose weights and activations are bfloat16."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = copy.deepcopy(module).to(torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.module(x.to(torch.bfloat16))
        return scores.float()


class _Autocast(nn.Module):
    """A module under autocast, which decides what is computed in bfloat16."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = copy.deepcopy(module)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            scores: Tensor = self.module(x)
        return scores.float()


def _eager(wrapped: Callable[[nn.Module], nn.Module], source: Network, x: Tensor, threads: int) -> Callable[[], Any]:
    return partial(wrapped(folded(source.model, torch.channels_last)), x)


def _compiled(wrapped: Callable[[nn.Module], nn.Module], source: Network, x: Tensor, threads: int) -> Callable[[], Any]:
    call: Any = torch.compile(wrapped(source.model).eval(), options={"freezing": True, "cpp.threads": threads})
    return partial(call, x)


def _pt2e(source: Network, x: Tensor, threads: int) -> Callable[[], Any]:
    """Ranges from the calibration images, a scale for each output channel; the graph is lowered by Inductor."""
    from torch._inductor import config
    from torchao.quantization.pt2e.lowering import lower_pt2e_quantized_to_x86
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    # Only a setting for all reaches what the lowering compiles itself.
    with config.patch({"freezing": True, "cpp.threads": threads}):
        with torch.inference_mode(False), torch.no_grad():
            lowered = lower_pt2e_quantized_to_x86(quantized_by_pt2e(source, quantizer, x), (x.clone(),))
        call: Any = torch.compile(lowered)
        call(x)
    return partial(call, x)


def quantized_by_pt2e(source: Network, quantizer: Any, x: Tensor) -> Any:
    """The network with PyTorch's quantised operations in it, for batches as large as ``x``."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    with warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad():
        warnings.simplefilter("ignore")
        example = torch.cat(source.calibration())[: len(x)]
        prepared = prepare_pt2e(torch.export.export(_in_steps(source.model), (example,)).module(), quantizer)
        for batch in torch.cat(source.calibration()).split(len(x)):
            prepared(batch)
        return convert_pt2e(prepared)


def _in_steps(model: nn.Module) -> nn.Module:
    """A copy with norms folded and a module for each call: quantisers take a module that is called twice for one."""
    steps = torch.fx.symbolic_trace(folded(model, torch.contiguous_format))
    for i, node in enumerate(steps.graph.nodes):
        node.meta.clear()
        if node.op == "call_module":
            steps.add_submodule(f"step_{i}", copy.deepcopy(steps.get_submodule(node.target)))
            node.target = f"step_{i}"
    steps.recompile()
    return steps.eval()


def _sepconv(precision: str, source: Network, x: Tensor, threads: int) -> Callable[[], Any]:
    from sepconv.compile import compile

    options: dict[str, Any] = {"precision": precision}
    return partial(compile(source.model, x, **options), x)


def _sepconv_int8(source: Network, x: Tensor, threads: int) -> Callable[[], Any]:
    from sepconv.compile import compile

    return partial(compile(source.quantized, x), x)


CONTENDERS = (
    Contender("sepconv", (), _OURS, "nchw", partial(_sepconv, _BF16), True, precision=_BF16),
    Contender("torch-nhwc", (), (), "nhwc", partial(_eager, _Converted), True, precision=_BF16),
    Contender("torch-nhwc-autocast", (), (), "nhwc", partial(_eager, _Autocast), True, precision=_BF16),
    Contender(
        "torch-compile-freezing", (), _INDUCTOR, "nchw", partial(_compiled, _Converted), True, True, precision=_BF16
    ),
    Contender(
        "torch-compile-autocast", (), _INDUCTOR, "nchw", partial(_compiled, _Autocast), True, True, precision=_BF16
    ),
    Contender("sepconv", (), _OURS, "nchw", _sepconv_int8, True, precision=_INT8),
    Contender("torch-compile-pt2e", ("torchao",), _INDUCTOR, "nchw", _pt2e, True, True, precision=_INT8),
)
