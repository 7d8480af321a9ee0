"""Compile Triton's depthwise kernels for GPUs that are not here, and tell what their code is like. Run in a process of
its own, where nothing is interpreted: ``python triton_code.py '[["cuda", 90, "bfloat16", "channels_last", ...]]'``."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from cases import CASES
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver

from sepconv.kernels import case
from sepconv.kernels.case import Case, Geometry
from sepconv.kernels.triton import plan, tiles
from sepconv.kernels.triton.compiled import filters, gather, launch
from sepconv.kernels.triton.forms import Schedule
from sepconv.kernels.triton.tiles import Gpu

CHANNELS = 72
"""A multiple of 8: Triton finds out by itself what 16 divides, and no less."""


class Wanted(NamedTuple):
    """A convolution of ``dims`` dimensions with a filter of ``size`` in each, compiled with tile number ``tile``."""

    backend: str
    arch: Any
    dtype: str
    layout: str
    which: str
    size: int
    stride: int
    tile: int
    dims: int = 2
    multiplier: int = 1
    side: int = 56

    def case(self) -> Case:
        dtype = getattr(torch, self.dtype)
        image, forms = (32, CHANNELS, *(self.side,) * self.dims), {4: torch.channels_last, 5: torch.channels_last_3d}
        x = torch.empty(image, dtype=dtype, device="meta")
        if self.layout == "channels_last":
            x = x.to(memory_format=forms[x.dim()])
        weight = torch.empty(CHANNELS * self.multiplier, 1, *(self.size,) * self.dims, dtype=dtype, device="meta")
        padding = ((self.size // 2,) * 2,) * self.dims
        geometry = Geometry((self.stride,) * self.dims, padding, (1,) * self.dims)
        bias = torch.empty(CHANNELS * self.multiplier, dtype=dtype, device="meta")
        forward = case.depthwise(x, weight, bias, geometry, "silu")
        if self.which == "forward":
            return forward
        if self.which == "grad_input":
            return case.depthwise_grad_input(forward.y, weight, x.shape, geometry)
        return case.depthwise_grad_weight(forward.y, x, weight.shape, geometry)


def _types(argument: Any, at: tuple[int, ...], constants: dict[Any, Any], attributes: dict[Any, Any]) -> Any:
    """As a launch would find them: 1 is a constant, and what 16 divides is known to be."""
    if isinstance(argument, tuple):
        found = [_types(value, (*at, i), constants, attributes) for i, value in enumerate(argument)]
        return type(argument)(*found)
    if argument == 1:
        constants[at] = 1
        return "constexpr"
    if isinstance(argument, str) or argument % 16 == 0:
        attributes[at] = [["tt.divisibility", 16]]
    return argument if isinstance(argument, str) else "i32"


def compiled(known: Case, schedule: Schedule, target: GPUTarget) -> Any:
    names = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
    number, planned = names[known.x.dtype], plan.launch(known, schedule)
    if known.which == "grad_weight":
        program: Any = filters.filter_gradient
        arguments = [number, number, "*fp32", planned.read, planned.written, planned.shares]
    else:
        program = gather.gather
        filter_number = "*fp32" if planned.steps.of_filter == 1 else number
        arguments = [number, filter_number, number, number, planned.read, planned.written, planned.steps]
    constants: dict[Any, Any] = {(len(arguments),): planned.form}
    attributes: dict[Any, Any] = {}
    types = [_types(argument, (i,), constants, attributes) for i, argument in enumerate(arguments)]
    signature = dict(zip(program.arg_names, [*types, "constexpr"], strict=True))
    source = ASTSource(program, signature, constants, attributes)
    return triton.compile(source, target=target, options=tiles.options(planned.form, target.backend == "hip"))


def _nvidia(code: Any) -> dict[str, Any]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.findall(rf"{name}:(\d+)", usage)[-1]) for name in ("REG", "STACK", "LOCAL"))
    loads = re.findall(r"ld\.global\S*", code.asm["ptx"])
    wide = sum(bool(re.search(r"v4\.b32|v8|v2\.b64", load)) for load in loads)
    return {"registers": registers, "spilled": stack + local, "loads": len(loads), "wide": wide}


def _amd(code: Any) -> dict[str, Any]:
    text = code.asm["amdgcn"]
    [registers] = re.findall(r"\.vgpr_count:\s+(\d+)", text)
    # Scalar registers are spilled to lanes of vector registers; only these go to memory.
    spilled = sum(int(n) for n in re.findall(r"\.(?:vgpr_spill_count|private_segment_fixed_size):\s+(\d+)", text))
    loads = re.findall(r"(?:global|buffer)_load_\w+", text)
    return {
        "registers": int(registers),
        "spilled": spilled,
        "loads": len(loads),
        "wide": sum(load.endswith("dwordx4") for load in loads),
    }


def look(wanted: Wanted) -> dict[str, Any]:
    known = wanted.case()
    target = GPUTarget(wanted.backend, wanted.arch, 32 if wanted.backend == "cuda" else 64)
    tiles.gpu = lambda device: Gpu(132, target.warp_size)
    plan.schedules.cache_clear()
    tried = plan.schedules(known)
    code = compiled(known, tried[wanted.tile], target)
    found = _nvidia(code) if wanted.backend == "cuda" else _amd(code)
    return {**found, "shared": code.metadata.shared, "tiles": len(tried)}


def names_of_what_spills(target: GPUTarget) -> tuple[int, list[str]]:
    """Every named edge case in every pass and layout, as it would be launched first: how many there were."""
    formats, count, spilling = {4: torch.channels_last, 5: torch.channels_last_3d}, 0, []
    for one in CASES:
        size = (max(1, one.batch), one.channels, *one.image)
        for form in dict.fromkeys((torch.contiguous_format, formats.get(len(size), torch.contiguous_format))):
            x = torch.empty(size, device="meta").to(memory_format=form)
            weight = torch.empty(one.channels * one.multiplier, 1, *one.kernel, device="meta")
            forward = case.depthwise(x, weight, None, one.geometry, "gelu_tanh")
            grad_input = case.depthwise_grad_input(forward.y, weight, x.shape, one.geometry)
            grad_weight = case.depthwise_grad_weight(forward.y, x, weight.shape, one.geometry)
            for known in (forward, grad_input, grad_weight):
                count += 1
                if _nvidia(compiled(known, plan.schedules(known)[0], target))["spilled"]:
                    spilling.append(f"{one.name}, {form}, {known.which}")
    return count, spilling


class _Driver:
    """Of a device that is not there."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def names_of_what_is_launched() -> list[str]:
    """Both kinds of kernels called with tensors, all but the launch itself: Triton finds the types of the arguments."""
    launched = []
    driver.set_active(_Driver())
    for program in (gather.gather, filters.filter_gradient, filters.add_shares):

        def compile_only(*given: Any, program: Any = program, **options: Any) -> None:
            code = type(program).run(program, *given, **{**options, "warmup": True})
            assert code.asm["ptx"]
            launched.append(program.__name__)

        program.run = compile_only
    x = torch.randn(2, 72, 9, 11).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(72, 1, 3, 3), torch.randn(72)
    forward = case.depthwise(x, weight, bias, Geometry((1, 1), ((1, 1), (1, 1)), (1, 1)), "clamp(-1.0, 0.5)")
    gradient = case.depthwise_grad_weight(x, x, weight.shape, forward.geometry)
    launch.kernel(forward, plan.schedules(forward)[0])(x, weight, bias)
    launch.kernel(gradient, plan.schedules(gradient)[0])(x, x)
    return launched


if __name__ == "__main__":
    if sys.argv[1] == "launches":
        print(json.dumps(names_of_what_is_launched()))
    elif sys.argv[1] == "cases":
        print(json.dumps(names_of_what_spills(GPUTarget("cuda", 90, 32))))
    else:
        print(json.dumps([look(Wanted(*one)) for one in json.loads(sys.argv[1])]))
