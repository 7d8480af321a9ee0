"""What is installed, which kernels run here, what is missing and how to get it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from sepconv import ops
from sepconv.kernels.halide.jit import code_cache, runtime
from sepconv.kernels.halide.jit import threads as halide_threads
from sepconv.kernels.triton import depthwise as triton_kernels
from sepconv.kernels.triton import verdicts
from sepconv.ops import explain
from sepconv.system import environment

OPTIONAL = {
    "datasets": ("parquet files and Hugging Face data sets", "data"),
    "onnx": ("ONNX export", "onnx"),
    "onnxscript": ("ONNX export", "onnx"),
    "onnxruntime": ("checking ONNX files", "onnx"),
}


PROBE = "8 images of 64 channels and 56x56 pixels, channels_last"
"""What the operations are tried on."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: what.
        status: "ok"; "missing" (something is not available, the rest works); "slow" (works, but costs time).
        detail: what was found.
        remedy: what to do about it; empty where there is nothing to do.
    """

    name: str
    status: str
    detail: str
    remedy: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """Everything the doctor found, and which kernel ran each operation when it was tried."""

    findings: list[Finding]
    kernels: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        return {
            "machine": environment.machine(),
            "versions": environment.versions(),
            "findings": [asdict(finding) for finding in self.findings],
            "kernels": self.kernels,
        }

    def __str__(self) -> str:
        lines = []
        for finding in self.findings:
            lines.append(f"{finding.status:8}{finding.name}: {finding.detail}")
            if finding.remedy:
                lines.append(f"{'':8}-> {finding.remedy}")
        lines += [f"{'kernel':8}{op}: {kernel}" for op, kernel in self.kernels.items()]
        return "\n".join(lines)


def doctor() -> Diagnosis:
    """Look at the installation and the machine, and try every operation once.

    Example:
        >>> doctor().findings[0].name
        'torch'
    """
    findings = [_torch(), _threads(), _gpu(), _halide(), _cache(), *_optional(), *_spinning_pools()]
    return Diagnosis(findings, _kernels())


def _torch() -> Finding:
    return Finding("torch", "ok", f"{torch.__version__}, {torch.backends.cpu.get_cpu_capability()}")


def _threads() -> Finding:
    threads, cores = torch.get_num_threads(), environment.cores()
    detail = f"PyTorch uses {threads} of {cores} cores"
    if threads > cores:
        return Finding("threads", "slow", detail, f"set OMP_NUM_THREADS={cores}")
    reason = halide_threads.missing()
    if not reason:
        return Finding("threads", "ok", detail)
    alone = f"{detail}; Halide's kernels could use one only: {reason}"
    return Finding("threads", "slow", alone, "OMP_NUM_THREADS=1 lets them run")


def _gpu() -> Finding:
    if not torch.cuda.is_available():
        build = "" if torch.version.cuda or torch.version.hip else ", whose build is for processors"
        needed = "kernels for one (NVIDIA, AMD) need a build of PyTorch for it and the package triton"
        return Finding(
            "gpu", "ok", f"none that this PyTorch can use{build}; everything runs on the processor; {needed}"
        )
    name, reason = torch.cuda.get_device_name(), triton_kernels.missing()
    if reason:
        detail = f"{name}: PyTorch's kernels alone run there; {reason}"
        return Finding("gpu", "missing", detail, triton_kernels.remedy())
    if reason := triton_kernels.too_old(torch.device("cuda", torch.cuda.current_device())):
        return Finding("gpu", "ok", f"{name}: PyTorch's kernels alone run there; {reason}")
    folder = verdicts.folder()
    proven = f"{len(list(folder.glob('*.json')))} proofs in {folder}" if folder else "proofs are not kept on disk"
    detail = f"{name}, triton {verdicts.triton_version()}: depthwise kernels are tried there; {proven}"
    return Finding("gpu", "ok", detail)


def _halide() -> Finding:
    reason = runtime.missing()
    if not reason:
        return Finding("halide", "ok", f"{environment.installed('halide')}, target {runtime.target()}")
    return Finding(
        "halide",
        "missing",
        f"{reason}; PyTorch's kernels run instead",
        "pip install halide (wheels: Linux x86-64, macOS arm64, Windows; CPython up to 3.13)",
    )


def _cache() -> Finding:
    reason = code_cache.unusable()
    if not reason:
        folder = code_cache.folder()
        assert folder is not None
        return Finding("cache", "ok", f"{len(list(folder.glob('*.o')))} kernels in {folder}")
    detail = f"kernels are compiled anew in every process: {reason}"
    return Finding("cache", "slow", detail, f"set {code_cache.VARIABLE} to a folder of your own")


def _optional() -> Iterator[Finding]:
    for package, (purpose, extra) in OPTIONAL.items():
        number = environment.installed(package)
        if number:
            yield Finding(package, "ok", f"{number} ({purpose})")
        else:
            yield Finding(package, "missing", f"needed for {purpose}", f"pip install 'sepconv[{extra}]'")


def _spinning_pools() -> Iterator[Finding]:
    """Pools of other libraries whose idle workers keep cores busy, which halves a parallel kernel's speed."""
    from threadpoolctl import threadpool_info  # type: ignore[import-untyped]

    for pool in threadpool_info():
        if pool["user_api"] == "blas" and pool["num_threads"] > 1:
            name, number = pool["internal_api"], pool["num_threads"]
            variable = {"openblas": "OPENBLAS_NUM_THREADS", "mkl": "MKL_NUM_THREADS"}.get(name, "OMP_NUM_THREADS")
            yield Finding(
                f"{name} threads",
                "slow",
                f"{number} workers that go on spinning after a numpy matrix product and slow kernels beside them",
                f"set {variable}=1",
            )


def _kernels() -> dict[str, str]:
    """The kernel behind each operation, and why no faster one, found by running it with its gradients."""
    found: dict[str, str] = {}
    for choice in explain.explain(_try_operations):
        reasons = "; ".join(f"not {kernel}: {reason}" for kernel, reason in choice.reasons.items())
        found.setdefault(choice.op, f"{choice.kernel} ({reasons})" if reasons else choice.kernel)
    return found


def _try_operations() -> None:
    x = torch.randn(8, 64, 56, 56).contiguous(memory_format=torch.channels_last)
    depthwise, pointwise = torch.randn(64, 1, 3, 3), torch.randn(64, 64, 1, 1)
    functions: list[Callable[[Tensor], Tensor]] = [
        lambda x: ops.depthwise_conv2d(x, depthwise, padding=1),
        lambda x: ops.pointwise_conv2d(x, pointwise),
        lambda x: ops.separable_conv2d(x, depthwise, pointwise, padding=1),
    ]
    with torch.no_grad():
        for function in functions:
            function(x)
    x.requires_grad_()
    large = torch.randn(64, 1, 5, 5, requires_grad=True)
    ops.depthwise_conv2d(x, large, padding=2).sum().backward()
