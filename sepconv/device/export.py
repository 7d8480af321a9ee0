"""``sepconv.export_c``: a network as a C library for another machine."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import sepconv
from sepconv.compile.capture import CaptureError
from sepconv.compile.model import CompiledModel, arguments_of, unprepared
from sepconv.compile.precision import BFLOAT16, INT8, precision_of
from sepconv.compile.prepare import WrittenModel
from sepconv.device import archive, elf, files, glue, loops, objects, targets, wasm, wasm_link
from sepconv.device import check as checking
from sepconv.device.origin import UNKNOWN, where
from sepconv.device.record import Normalisation, Recorder, Recording
from sepconv.device.targets import DeviceTarget
from sepconv.kernels.halide.jit import runtime
from sepconv.kernels.halide.schedule.machine import targeting
from sepconv.system.environment import installed
from sepconv.system.threads import threads_set_to

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,59}")
# Libraries and headers of C: a program would be linked with, or include, the network's in their place.
_TAKEN = re.compile(
    "c|dl|gcc|m|pthread|rt|assert|complex|ctype|errno|fenv|float|inttypes|iso646|limits|locale|math|setjmp|signal|stdalign|"
    "stdarg|stdatomic|stdbool|stddef|stdint|stdio|stdlib|stdnoreturn|string|tgmath|threads|time|uchar|wchar|wctype"
)
_VERSIONS = ("torch", "halide", "llvmlite")


@dataclass(frozen=True)
class ExportedLibrary:
    """What was written.

    Attributes:
        folder, name, target: as asked for.
        precision: "float32" or "int8".
        inputs, outputs: their sizes.
        macs: multiply-adds of one call.
        code_bytes: of all objects without the weights.
        weights_bytes, arena_bytes: of what is read, and of all the memory that a call writes to.
        threads: that a call computes on.
        checked: what was found when the example ran here, or why it did not run.
    """

    folder: Path
    name: str
    target: str
    precision: str
    inputs: tuple[tuple[int, ...], ...]
    outputs: tuple[tuple[int, ...], ...]
    macs: int
    code_bytes: int
    weights_bytes: int
    arena_bytes: int
    threads: int = 1
    checked: str = ""


def export_c(
    model: nn.Module | CompiledModel,
    example: Any,
    folder: str | Path,
    *,
    target: str = "x86-64-linux",
    name: str = "model",
    threads: int = 1,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    bgr: bool = False,
    classes: Sequence[str] = (),
    check: bool = False,
) -> ExportedLibrary:
    """A network as a C library that needs nothing but the C library: kernels, weights and memory for one call.

    ``NAME_run(input, output)`` of ``NAME.h`` computes what the model does for inputs of the example's sizes. No C
    compiler is needed; what a call computes is compared with the model before anything is written.

    Args:
        model: in evaluation mode, in float32 or quantized (see ``sepconv.quantize``), or compiled.
        example: a tensor, a tuple of positional arguments, or a dict of keyword arguments. Its sizes are those of the
            library.
        folder: is made where it does not exist.
        target: "x86-64-linux" (SSE4.1), "x86-64-linux-avx2", "x86-64-linux-avx512", "x86-64-linux-avx512-vnni",
            "arm-64-linux", "arm-64-android" (both also with "-dotprod"), "arm-64-osx" or "wasm-32".
        name: every symbol of the library begins with it; not that of a library or header of C.
        threads: that a call computes on. It starts and ends all but its own itself.
        mean, std: of each channel, from 0 to 1: with them the library also takes images of bytes.
        bgr: whether the network's channels are blue, green, red.
        classes: names for the outputs.
        check: build the example with the C compiler for that machine and run it here, if both can be.

    Raises:
        ValueError: an argument is wrong, or an operation has no kernel; each is named. Nothing is written.
        OSError: the folder cannot be written.
        RuntimeError: what was built gives other answers than the model.
    """
    goal = targets.target_named(target)
    _check_arguments(name, mean, std)
    _check_threads(threads, goal)
    if any(re.search(r"[\0\r\n]", text) for text in classes):
        raise ValueError("export_c: the names of classes must be single lines")
    folder = Path(folder)
    files.check_folder(folder)
    if runtime.missing():
        raise ValueError(f"export_c: {runtime.missing()}")
    normalisation = Normalisation(tuple(mean), tuple(std), bgr) if mean else None
    with targeting(goal.machine), threads_set_to(threads):
        written = _written(model, example)
        recording = _recorded(written, normalisation, threads)
        built = _built(name, goal, recording, tuple(classes))
    library = _described(folder, name, target, written, recording, built)
    content = files.texts(library, goal, normalisation, classes)
    content |= built.files
    content[files.MANIFEST] = _manifest(library, built, sorted([*content, files.MANIFEST]))
    files.write(folder, content)
    return _checked(library, goal, written) if check else library


def _check_arguments(name: str, mean: Sequence[float], std: Sequence[float]) -> None:
    if not _NAME.fullmatch(name):
        raise ValueError(f"export_c: name must be a C identifier of at most 60 letters, got {name!r}")
    if _TAKEN.fullmatch(name.lower()):
        raise ValueError(f"export_c: name must not be that of a library or header of C, got {name!r}")
    if len(mean) != len(std):
        raise ValueError(f"export_c: mean and std must have a number for each channel, got {mean} and {std}")


def _check_threads(threads: int, goal: DeviceTarget) -> None:
    most = 1 if goal.is_wasm else loops.MOST
    if isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= most:
        allowed = f"from 1 to {most}" if most > 1 else f"1, since {goal.name} has none"
        raise ValueError(f"export_c: threads must be {allowed}, got {threads!r}")


def _written(model: nn.Module | CompiledModel, example: Any) -> WrittenModel:
    try:
        compiled = model if isinstance(model, CompiledModel) else unprepared(model)
        example = pytree.tree_map_only(Tensor, Tensor.contiguous, example)
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("compile:", "export_c:", 1)) from error
    if compiled.precision == BFLOAT16:
        raise ValueError("export_c: libraries compute in float32 or int8, but the model was compiled for bfloat16")
    args, kwargs = arguments_of(example)
    try:
        written = compiled.write(*args, **kwargs)
    except CaptureError as error:
        raise ValueError(f"export_c: the model cannot be captured: {error}") from error
    except ValueError as error:
        raise ValueError(f"export_c: {str(error).removeprefix('compile: ')}") from error
    for what, tensors in (("inputs", written.inputs), ("outputs", written.expected)):
        wrong = next((tensor.dtype for tensor in tensors if tensor.dtype is not torch.float32), None)
        if wrong is not None or not tensors:
            raise ValueError(f"export_c: {what} must be float32 tensors, got {wrong or 'none'}")
    return written


def _recorded(written: WrittenModel, normalisation: Normalisation | None, threads: int) -> Recording:
    """The network's calls, once they have computed here what the model does."""
    recorder = Recorder(written.program, written.store)
    refused = recorder.refused()
    if refused:
        known = where(written, {step.what for step in refused if not step.name})
        texts = [f"{step.what} in {step.name or known.get(step.what, UNKNOWN)} ({step.reason})" for step in refused]
        raise ValueError(f"export_c: no kernel computes {'; '.join(dict.fromkeys(texts))}")
    _check_image(written.inputs, normalisation)
    recorder.bind(normalisation)
    difference = written.disagreement(recorder.run(written.inputs))
    if difference:
        raise RuntimeError(f"export_c: {difference}")
    return recorder.recording(threads)


def _check_image(inputs: Sequence[Tensor], normalisation: Normalisation | None) -> None:
    if normalisation is None:
        return
    shapes = [tuple(tensor.shape) for tensor in inputs]
    if len(shapes) != 1 or len(shapes[0]) != 4 or shapes[0][1] != len(normalisation.mean):
        raise ValueError(
            f"export_c: mean and std must have a number for each channel of one image, got {len(normalisation.mean)} "
            f"for inputs of {shapes}"
        )


@dataclass(frozen=True)
class _Built:
    """The library's files by name, the library itself first, and bytes of its objects without the weights."""

    files: dict[str, bytes]
    code: int

    @property
    def library(self) -> bytes:
        return next(iter(self.files.values()))


def _built(name: str, goal: DeviceTarget, recording: Recording, classes: tuple[str, ...]) -> _Built:
    kernels = list(objects.compiled(name, recording.recipes))
    made = glue.glue_of(name, tuple(kernel.symbol for kernel in kernels), recording, classes)
    own, weights = glue.compiled(glue.assembly(made, goal), goal), len(recording.weights)
    code = [own, *(kernel.code for kernel in kernels)]
    if goal.is_wasm:
        module = wasm_link.link(code, made.functions, wasm.PROVIDED)
        return _Built({f"{name}.wasm": module}, len(module) - weights)
    if goal.is_apple:
        members = [archive.Member(f"{name}.o", own, made.exported)]
        members += [archive.Member(f"{kernel.symbol}.o", kernel.code, [kernel.symbol]) for kernel in kernels]
        return _Built({f"lib{name}.a": archive.archive(members, bsd=True)}, sum(map(len, code)) - weights)
    whole = elf.link(code, made.exported)
    library = archive.archive([archive.Member(f"{name}.o", whole, made.exported)])
    return _Built({f"lib{name}.a": library, f"{name}.o": whole}, len(whole) - weights)


def _described(
    folder: Path, name: str, target: str, written: WrittenModel, recording: Recording, built: _Built
) -> ExportedLibrary:
    steps = [(step.group, step.outputs[0].form.shape) for step in written.program.steps if step.outputs]
    return ExportedLibrary(
        folder,
        name,
        target,
        INT8 if precision_of(written.program.numbers) == INT8 else "float32",
        tuple(tuple(tensor.shape) for tensor in written.inputs),
        tuple(tuple(tensor.shape) for tensor in written.expected),
        sum(group.macs(shape) for group, shape in steps if group is not None),
        built.code,
        len(recording.weights),
        recording.arena,
        recording.threads,
    )


def _manifest(library: ExportedLibrary, built: _Built, names: list[str]) -> bytes:
    facts = {key: value for key, value in asdict(library).items() if key not in ("folder", "checked")}
    facts["versions"] = {"sepconv": sepconv.__version__, **{package: installed(package) for package in _VERSIONS}}
    facts["files"] = names
    facts["library_bytes"] = len(built.library)
    facts["sha256"] = hashlib.sha256(built.library).hexdigest()
    return (json.dumps(facts, indent=1) + "\n").encode()


def _checked(library: ExportedLibrary, goal: DeviceTarget, written: WrittenModel) -> ExportedLibrary:
    return replace(library, checked=checking.check(library, goal, written))
