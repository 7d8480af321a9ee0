"""The example of a library, built with the C compiler that is here for it, and run against the model's own answer."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sepconv.compile.prepare import WrittenModel
from sepconv.device import files, wasm
from sepconv.device.targets import DeviceTarget
from sepconv.kernels.halide.jit import llvm

if TYPE_CHECKING:
    from sepconv.device.export import ExportedLibrary

_SECONDS, _INPUT = 600, "input.bin"
WARNINGS = ("-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Werror")


def missing(goal: DeviceTarget) -> str:
    """Why no program for the target can be built and run here, in a sentence; "" if it can."""
    if goal.is_wasm:
        return "" if shutil.which("node") else "there is no node here"
    if not goal.compiler:
        return f"nothing here builds programs for {goal.name}"
    if not shutil.which(goal.compiler):
        return f"there is no {goal.compiler} here"
    if goal.runner and not shutil.which(goal.runner[0]):
        return f"there is no {goal.runner[0]} here"
    lacking = [feature for feature in goal.needs if not llvm.host_has(feature)]
    return f"this processor has no {', '.join(lacking)}" if lacking else ""


def check(library: ExportedLibrary, goal: DeviceTarget, written: WrittenModel) -> str:
    """What was found, or why nothing was.

    Raises:
        RuntimeError: the example cannot be built, does not run, or gives other answers than the model.
    """
    reason = missing(goal)
    if reason:
        return f"not checked: {reason}"
    with tempfile.TemporaryDirectory(prefix="sepconv-") as folder:
        program = Path(folder) / ("example.mjs" if goal.is_wasm else "example")
        build(library, goal, program)
        got = answers(library, goal, program, written.inputs)
    difference = written.disagreement(got)
    if difference:
        raise RuntimeError(f"export_c: the example for {goal.name} is wrong: {difference}")
    return "the example gives the model's answer" + (f" ({goal.runner[0]})" if goal.runner else "")


def build(library: ExportedLibrary, goal: DeviceTarget, program: Path, *options: str) -> None:
    """The example as a program.

    Raises:
        RuntimeError: the compiler refuses it.
    """
    if goal.is_wasm:
        program.write_text(wasm.check_script(library, program.with_name(_INPUT)))
        return
    source = [str(library.folder / "example.c"), "-o", str(program), "-L", str(library.folder)]
    _run([goal.compiler, "-O2", *WARNINGS, *options, *source, f"-l{library.name}", *files.needed(library)])


def answers(library: ExportedLibrary, goal: DeviceTarget, program: Path, inputs: list[Tensor]) -> list[Tensor]:
    """What the example prints for these inputs, as the model returns it."""
    file = program.with_name(_INPUT)
    file.write_bytes(b"".join(x.contiguous().numpy().tobytes() for x in inputs))
    printed = _run([*goal.runner, str(program), str(file)])
    numbers = torch.tensor([float(line.split()[0]) for line in printed.splitlines()])
    sizes = [torch.Size(shape).numel() for shape in library.outputs]
    if len(numbers) != sum(sizes):
        raise RuntimeError(f"export_c: the example printed {len(numbers)} numbers in the place of {sum(sizes)}")
    return [part.view(shape) for part, shape in zip(numbers.split(sizes), library.outputs, strict=True)]


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise RuntimeError(f"export_c: {command[0]} failed ({done.returncode}): {said[0] if said else ''}")
    return done.stdout
