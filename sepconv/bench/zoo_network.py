"""One network of timm or torchvision by sepconv, by PyTorch and by OpenVINO: what a process of ``bench zoo`` does.

Weights are random, and so are all that a fresh network has as ones or zeros: what norms, gates and layer scales do
shows in the result. Statistics of batch norms are as random images have them.
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from sepconv.bench.peers import CONTENDERS, Network
from sepconv.bench.records import Record
from sepconv.compile import compile
from sepconv.compile.capture import first_line
from sepconv.models import create
from sepconv.system.threads import threads_set_to
from sepconv.system.timing import Timing, interleaved

TOLERANCE = 1e-4
"""Largest error allowed, relative to the largest output in float64."""

_SIDES = {"torchvision/ssdlite320_mobilenet_v3_large": 320}
_LISTS = ("torchvision/ssdlite",)
SEED = 0
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

Call = Callable[[], Any]


@dataclass(frozen=True)
class Measured:
    """What one process found.

    Attributes:
        ready_s: from the module in memory to its first result by sepconv.
        reason: why it runs through PyTorch as a whole, or which parts of it; "" if all of it was captured.
        kernels: how many steps each kind of kernel computes.
        errors: of each contender, in units of the tolerance.
        timings: of each contender.
        absent: contenders that did not run, and why.
    """

    network: str
    threads: int
    ready_s: float
    reason: str
    kernels: dict[str, int]
    macs: int
    bytes: int
    errors: dict[str, float]
    timings: dict[str, Timing]
    absent: dict[str, str]

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Measured:
        timings = {name: Timing(**timing) for name, timing in content["timings"].items()}
        return cls(**{**content, "timings": timings})

    def facts(self) -> dict[str, Any]:
        """What is not in the rows."""
        keys = ("network", "threads", "ready_s", "reason", "kernels", "absent")
        return {key: value for key, value in asdict(self).items() if key in keys}

    def rows(self) -> list[Record]:
        kernel = " and ".join(sorted(self.kernels)) or "torch"
        return [
            Record(
                "zoo", self.network, name, self.threads, "nhwc" if name.endswith("nhwc") else "nchw", t.median_ms,
                t.low_ms, t.high_ms, t.samples, self.macs, self.bytes, round(self.errors[name], 4),
                kernel if name == "sepconv" else name,
            )
            for name, t in self.timings.items()
        ]  # fmt: skip


def images(name: str, batch: int = 1) -> Tensor:
    side = _SIDES.get(name, 224)
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(SEED))


def _arguments(name: str, x: Tensor) -> Any:
    """Detectors take a list of images."""
    return list(x) if name.startswith(_LISTS) else x


@torch.no_grad()
def network_of(name: str) -> nn.Module:
    """The network in evaluation mode with nothing in it that has no effect."""
    torch.manual_seed(SEED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = create(name).eval()
    for parameter in model.parameters():
        first = parameter.flatten()[:1]
        if parameter.dim() and bool((parameter == first).all()):
            # Ones are scales; zeros and the tiny factors of layer scale would hide what they belong to.
            parameter.uniform_(0.5, 1.5) if float(first) == 1 else parameter.uniform_(-0.2, 0.2)
    norms = [module for module in model.modules() if isinstance(module, _NORMS)]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    model(_arguments(name, images(name, 4)))
    return model.eval()


def measure(name: str, threads: int, seconds: float, openvino: bool) -> Measured:
    """Ready first, then right, then timed.

    Raises:
        ValueError: a contender computed something else.
    """
    model, x = network_of(name), images(name)
    given = _arguments(name, x)
    absent: dict[str, str] = {}
    with threads_set_to(threads), torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        start = time.perf_counter()
        compiled = compile(model, (given,))
        compiled(given)
        ready = time.perf_counter() - start
        calls: dict[str, Call] = {"sepconv": partial(compiled, given), **_eager(name, model, x, absent)}
        with tempfile.TemporaryDirectory() as folder:
            if openvino:
                _add_openvino(calls, name, model, x, threads, Path(folder), absent)
            errors = _errors(name, model, given, calls)
            timings = interleaved(calls, seconds)
    explanation = compiled.explain()
    kernels: dict[str, int] = {}
    for group in explanation.groups:
        kernels[group.kernel] = kernels.get(group.kernel, 0) + 1
    return Measured(
        name, threads, round(ready, 3), explanation.reason, kernels, _macs(model, given), _bytes(model, x), errors,
        timings, absent,
    )  # fmt: skip


def _eager(name: str, model: nn.Module, x: Tensor, absent: dict[str, str]) -> dict[str, Call]:
    """PyTorch as it comes, in both layouts, and with batch norms folded by its own fusion where that can be traced."""
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    image = x.contiguous(memory_format=torch.channels_last)
    calls: dict[str, Call] = {
        "torch-nchw": partial(model, _arguments(name, x)),
        "torch-nhwc": partial(last, _arguments(name, image)),
    }
    try:
        from torch.fx.experimental.optimization import fuse

        folded: Any = fuse(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        folded(_arguments(name, image))
        calls["torch-folded-nhwc"] = partial(folded, _arguments(name, image))
    except Exception as error:  # tracing of other people's code fails in any way
        absent["torch-folded-nhwc"] = _said(error)
    return calls


def _add_openvino(
    calls: dict[str, Call], name: str, model: nn.Module, x: Tensor, threads: int, folder: Path, absent: dict[str, str]
) -> None:
    source = Network(name.replace("/", "-"), lambda: model, x.shape[-1], folder)
    source.__dict__["model"] = model
    try:
        calls["openvino"] = CONTENDERS["openvino"].build(source, x, threads)
        calls["openvino"]()
    except Exception as error:  # neither the export nor the runtime is ours
        calls.pop("openvino", None)
        absent["openvino"] = _said(error)


def _said(error: Exception) -> str:
    return first_line(error)[:200]


def _leaves(result: Any) -> list[Tensor]:
    """The results in numbers that are not whole, dataclasses and arrays included."""
    if hasattr(result, "_asdict"):
        result = tuple(result)
    leaves = [leaf if isinstance(leaf, Tensor) else torch.as_tensor(leaf) for leaf in pytree.tree_leaves(result)]
    return [leaf for leaf in leaves if leaf.is_floating_point()]


def _errors(name: str, model: nn.Module, given: Any, calls: Mapping[str, Call]) -> dict[str, float]:
    twice = pytree.tree_map(Tensor.double, given)
    truth = _leaves(copy.deepcopy(model).double()(twice))
    errors = {}
    for contender, call in calls.items():
        found = _leaves(call())
        if len(found) != len(truth):
            raise ValueError(f"bench zoo: {contender} gives {len(found)} results for {name}, not {len(truth)}")
        errors[contender] = max((_error(a, b) for a, b in zip(found, truth, strict=True)), default=0.0) / TOLERANCE
        if not errors[contender] <= 1:
            error = errors[contender]
            raise ValueError(f"bench zoo: {contender} on {name} differs from float64 by {error:.3g} times {TOLERANCE}")
    return errors


def _error(found: Tensor, truth: Tensor) -> float:
    if found.numel() == 0 and truth.numel() == 0:
        return 0.0
    found = found.double().reshape(truth.shape)
    return float((found - truth).abs().max() / truth.abs().max().clamp_min(1e-30))


def _macs(model: nn.Module, given: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        model(given)
    return int(counter.get_total_flops()) // 2


def _bytes(model: nn.Module, x: Tensor) -> int:
    return 4 * (sum(parameter.numel() for parameter in model.parameters()) + x.numel())


def main(name: str, threads: str, seconds: str, *more: str) -> None:
    print(json.dumps(asdict(measure(name, int(threads), float(seconds), "openvino" in more))))


if __name__ == "__main__":
    main(*sys.argv[1:])
