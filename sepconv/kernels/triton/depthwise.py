"""Depthwise convolution on GPUs: forward, gradient of the input and of the filters, each proven before it is used.

float32, bfloat16 and float16 with sums in float32; one to three spatial dimensions; tensors are read where they lie,
whatever their steps. Results have the layout of the first tensor that is read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from sepconv.kernels.case import Case, Outline
from sepconv.kernels.halide.jit.runtime import BuildError
from sepconv.kernels.triton import plan, proof, verdicts
from sepconv.kernels.triton.forms import Schedule
from sepconv.kernels.triton.proof import Kernel, Verdict

NUMBERS = (torch.float32, torch.bfloat16, torch.float16)
LONGEST = 63
MAX_PROOFS = 32
"""For so many sizes of images one convolution is proven in a process; networks whose images all have sizes of their own
would do nothing else."""

_proofs: Counter[Case] = Counter()
_proving = Lock()


@lru_cache(maxsize=1)
def missing() -> str:
    """Why Triton cannot be used, in a sentence; "" if it can. Triton is imported here first."""
    try:
        import triton

        triton.constexpr_function  # noqa: B018
    except ImportError as error:
        return f"the package triton cannot be imported ({error}); {remedy()}"
    except AttributeError:
        return (
            f"the package triton has version {triton.__version__}, and 3.5 (of PyTorch 2.9) is the first that will do"
        )
    return ""


def remedy() -> str:
    """How to get Triton: builds of PyTorch for AMD bring it in a package of another name, over which PyPI's would be
    installed."""
    if torch.version.hip is not None:
        return "install PyTorch's build for ROCm again, which brings it"
    return "pip install 'sepconv[gpu]'"


def supports(case: Case) -> str:
    """Why this kernel cannot do it, in a sentence; "" if it can."""
    if case.x.device.type != "cuda":
        return f"the kernel runs on cuda tensors but got device {case.x.device}"
    return unsuitable(case) or missing() or too_old(case.x.device)


def unsuitable(case: Case) -> str:
    """The same, whatever the device."""
    given = (*case.given, case.result)
    if case.bound:
        return "the kernel does not write to given memory"
    if any(not outline.plain for outline in given):
        return "the kernel reads plain strided tensors only"
    if len(case.numbers) > 1 or case.x.dtype not in NUMBERS:
        found = ", ".join(sorted(map(str, case.numbers)))
        return f"the kernel computes float32, bfloat16 or float16 but got {found}"
    if len({outline.device for outline in given}) > 1:
        return "the tensors are on several devices"
    if not all(outline.elements for outline in given):
        return "there is nothing to compute"
    if max(case.kernel_size) > LONGEST:
        return f"filters have {max(case.kernel_size)} taps in a row, and {LONGEST} are the most"
    if case.weight.elements > plan.MOST:
        return f"the filters have {case.weight.elements} numbers, and offsets of 32 bits reach {plan.MOST}"
    tiles = max(plan.launch(case, one).tiles for one in plan.schedules(case))
    return f"{tiles} tiles are more than can be counted in 32 bits" if tiles > plan.MOST else ""


def too_old(device: torch.device) -> str:
    """Why Triton has no code for it, in a sentence; "" if it has."""
    found = torch.cuda.get_device_properties(device)
    if torch.version.hip is None and found.major < 7:
        return f"Triton compiles for compute capability 7.0 and later, and this device has {found.major}.{found.minor}"
    return ""


def postponed(case: Case) -> str:
    """Why it cannot be proven at the moment, in a sentence; "" if it can."""
    if torch.compiler.is_compiling():
        return "torch.compile traces, and nothing is proven meanwhile"
    if _captures(case.x.device):
        return "a CUDA graph is captured, and nothing is proven or loaded meanwhile; call it once before"
    return ""


def _captures(device: torch.device) -> bool:
    """Whether a graph is captured on the stream of this device, which need not be the current one."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def slower(case: Case) -> str:
    """Why PyTorch's kernel is used, in a sentence; "" if this one is. What nobody knows yet is tried."""
    return verdict(case).reason


def verdict(case: Case) -> Verdict:
    """Threads prove one after the other, or they would be in each other's times."""
    case = _anywhere(case)
    tried = plan.schedules(case)
    with _proving:
        return verdicts.find(case, len(tried)) or _proven(case, tried)


def _proven(case: Case, tried: Sequence[Schedule]) -> Verdict:
    kind = _any_size(case)
    _proofs[kind] += 1
    if _proofs[kind] > MAX_PROOFS:
        return proof.refused(f"{MAX_PROOFS} sizes of this convolution were tried in this process, and no more are")
    found = proof.prove(case, _kernels(case, tried), proof.on_device(case.x.device))
    verdicts.keep(case, found)
    return found


def _kernels(case: Case, tried: Sequence[Schedule]) -> list[Callable[[], Kernel]]:
    from sepconv.kernels.triton.compiled.launch import kernel

    return [partial(kernel, case, one) for one in tried]


def _anywhere(case: Case) -> Case:
    """On a GPU nothing depends on the number of threads."""
    return replace(case, threads=0)


def _any_size(case: Case) -> Case:
    def kind(outline: Outline) -> Outline:
        return Outline(outline.shape[1:2], (), outline.dtype, outline.device)

    return replace(case, x=kind(case.x), y=kind(case.y))


def describe(case: Case) -> dict[str, Any]:
    """The tile, and both times of the proof."""
    found = verdict(case)
    return {
        "layout": "channels_last" if plan.pixelwise(case) else "contiguous",
        **plan.schedules(case)[found.schedule].tile._asdict(),
        "milliseconds": round(found.ours.device, 5),
        "pytorch_milliseconds": round(found.pytorch.device, 5),
    }


def _chosen(case: Case) -> Kernel:
    from sepconv.kernels.triton.compiled.launch import kernel

    return kernel(case, plan.schedules(case)[verdict(case).schedule])


def prepare(case: Case) -> Callable[..., Tensor]:
    """Where a launch fails, the next kernel computes; also for images at addresses that ask for code that was not
    proven, with loads of fewer bytes."""
    launched, together = _chosen(case), plan.reads_together(case)
    images = 2 if case.which == "grad_weight" else 1  # filters and biases are copied where need be
    loaded: set[tuple[bool, ...]] = set()

    def run(*tensors: Tensor | None) -> Tensor:
        aligned = tuple(t is None or t.data_ptr() % plan.BYTES_AT_ONCE == 0 for t in tensors[:images])
        if together and not all(aligned):
            raise BuildError(f"a tensor's memory begins at no multiple of {plan.BYTES_AT_ONCE} bytes")
        # Triton makes other code for other addresses, and to load it would end the capture.
        if aligned not in loaded and _captures(case.x.device):
            raise BuildError("a CUDA graph is captured, and no call before had its tensors at such addresses")
        try:
            result = launched(*tensors)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise BuildError(f"it failed on this device: {type(error).__name__}: {error}") from error
        loaded.add(aligned)
        return result

    return run
