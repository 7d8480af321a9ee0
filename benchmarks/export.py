"""`python -m benchmarks.export`: networks as C libraries: sizes, times, instructions, and WebAssembly in a browser.

One thread, one image. The library of this machine's own level is called in this process, in turn with the compiled
network. For ARM there are instructions counted under qemu, which say how much work there is and nothing of any board's
time. WebAssembly runs in Chromium, in turn with onnxruntime-web. Every library has given the model's answer before.
What cannot run here is listed with the reason.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import sepconv
from benchmarks import export_browser, export_instructions, export_ncnn
from benchmarks.export_tables import table
from benchmarks.record import save, stamped
from sepconv.device import ExportedLibrary, check, export_c
from sepconv.device.targets import TARGETS
from sepconv.models import MobileNetV1, MobileNetV2
from sepconv.runs.onnx_file import export_onnx
from sepconv.system.timing import Timing, interleaved

NAME = "export"
CALIBRATION = 32
MEASURED = ("target", "precision", "macs", "code_bytes", "weights_bytes", "arena_bytes", "checked")
LEVELS = ("avx512-vnni", "avx512", "avx2")
BASELINE = "x86-64-linux"
"""What instructions for ARM are compared with: the same number of lanes."""
ARM = ("arm-64-linux", "arm-64-linux-dotprod")
SIMD, SCALAR = "wasm-32", "wasm-32-scalar"
NOT_TRIED = {"instructions of TFLite": "only TensorFlow writes its format"}


class Network(NamedTuple):
    """A network, the side of its image, the targets besides this machine, and the precisions."""

    make: Callable[[], nn.Module]
    side: int
    targets: tuple[str, ...] = (*ARM, BASELINE, SIMD, SCALAR)
    precisions: tuple[str, ...] = ("float32", "int8")


NETWORKS = {
    "mobilenet_v1 0.5-160": Network(lambda: MobileNetV1(0.5), 160),
    "mobilenet_v2 1.0-224": Network(lambda: MobileNetV2(1.0), 224),
    "mobilenet_v1 0.25-128": Network(lambda: MobileNetV1(0.25), 128, ARM, ("int8",)),
    "mobilenet_v1 1.0-224": Network(lambda: MobileNetV1(1.0), 224, (), ("float32",)),
}


def own_level(precision: str) -> str:
    """The widest level of this processor; int8 by products of bytes where it has them."""
    names = [f"x86-64-linux-{level}" for level in LEVELS if precision == "int8" or level != "avx512-vnni"]
    return next((name for name in names if not check.missing(TARGETS[name])), "x86-64-linux")


def called(library: ExportedLibrary, x: Tensor) -> Callable[[], object]:
    """A call of the library, loaded into this process."""
    program = library.folder / "library.so"
    whole = ["-Wl,--whole-archive", str(library.folder / f"lib{library.name}.a"), "-Wl,--no-whole-archive"]
    subprocess.run(["gcc", "-shared", "-o", str(program), *whole, "-lm"], check=True)
    run, out = ctypes.CDLL(str(program)).model_run, torch.empty(library.outputs[0])

    def call() -> Tensor:
        run(ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(out.data_ptr()))
        return out

    return call


def measure(name: str, precision: str, seconds: float, folder: Path, absent: dict[str, str]) -> list[dict[str, Any]]:
    """A row for each target; ``absent`` gets what cannot be measured here, with the reason."""
    torch.manual_seed(0)
    network = NETWORKS[name]
    model, x = network.make().eval(), torch.randn(1, 3, network.side, network.side)
    if precision == "int8":
        # Weights are random, and rounding moves the answers of such networks far.
        model, _ = sepconv.quantize(model, torch.randn(CALIBRATION, *x.shape[1:]), force=True)
    own, rows = own_level(precision), {}
    libraries: dict[str, ExportedLibrary] = {}
    for target in dict.fromkeys((own, *network.targets)):
        libraries[target] = library = export_c(model, x, folder / target, target=target, check=True)
        facts = asdict(library)
        rows[target] = {"network": name, **{key: facts[key] for key in MEASURED}}
        rows[target]["library_bytes"] = json.loads((library.folder / "manifest.json").read_text())["library_bytes"]
        if target == own:
            rows[target] |= against_compile(library, sepconv.compile(model, x, threads=1), x, seconds)
        if target in (*ARM, BASELINE):
            rows[target] |= _instructions(library, absent)
        print(json.dumps(rows[target]), flush=True)
    if precision == "float32" and ARM[0] in network.targets:
        rows |= _ncnn(name, model, rows[ARM[0]]["macs"], folder, absent)
    in_browser = {target: libraries[target] for target in (SIMD, SCALAR) if target in libraries}
    for contender, found in _browser(folder, in_browser, model, seconds, absent).items():
        place = rows.setdefault(contender, {"network": name, "target": contender, "precision": precision})
        place["chromium"] = found
        print(name, precision, contender, json.dumps(found), flush=True)
    return list(rows.values())


def _instructions(library: ExportedLibrary, absent: dict[str, str]) -> dict[str, int]:
    what = f"instructions, {library.target}"
    if reason := export_instructions.missing(library.target):
        absent[what] = reason
        return {}
    try:
        return {"instructions": export_instructions.counted(library)}
    except subprocess.CalledProcessError as error:
        absent[what] = f"{Path(error.cmd[0]).name} failed ({error.returncode})"
        return {}


def _ncnn(name: str, model: nn.Module, macs: int, folder: Path, absent: dict[str, str]) -> dict[str, dict[str, Any]]:
    what, place = f"instructions of ncnn, {name}", folder / "ncnn"
    if reason := export_ncnn.missing():
        absent[what] = reason
        return {}
    place.mkdir()
    try:
        found = export_ncnn.counted(model, NETWORKS[name].side, place)
    except (ValueError, subprocess.CalledProcessError) as error:
        absent[what] = str(error)
        return {}
    row = {"network": name, "target": "ncnn for arm-64", "precision": "float32", "macs": macs, "instructions": found}
    print(json.dumps(row), flush=True)
    return {export_ncnn.OTHER: row}


def _browser(
    folder: Path, libraries: dict[str, ExportedLibrary], model: nn.Module, seconds: float, absent: dict[str, str]
) -> dict[str, dict[str, Any]]:
    """Times by contender, and how far each is from the model's answer."""
    if not libraries:
        return {}
    if reason := export_browser.missing():
        absent["Chromium"] = reason
        return {}
    [shape] = libraries[SIMD].inputs
    onnx: Path | None = folder / "model.onnx"
    try:
        absent.setdefault("versions", export_browser.fetched(folder))
        export_onnx(model, shape[1:], folder / "model.onnx")
    except (OSError, ValueError, ModuleNotFoundError, subprocess.SubprocessError) as error:
        absent[export_browser.OTHER], onnx = str(error), None
    found, answers = export_browser.measured(folder, libraries, onnx, seconds)
    with torch.no_grad():
        expected = model(export_browser.given(shape)).flatten()
    for name, times in found.items():
        times["error"] = float((answers[name] - expected).norm() / expected.norm())
        times["over_ours"] = round(times["median_ms"] / found[SIMD]["median_ms"], 3)
    return found


def against_compile(
    library: ExportedLibrary, compiled: Callable[[Tensor], Any], x: Tensor, seconds: float
) -> dict[str, Any]:
    times: dict[str, Timing] = interleaved({"library": called(library, x), "compile": lambda: compiled(x)}, seconds)
    ratio = round(times["library"].median_ms / times["compile"].median_ms, 3)
    return {**{f"{name}_ms": asdict(timing) for name, timing in times.items()}, "over_compile": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.export", description=__doc__)
    parser.add_argument("--seconds", type=float, default=4.0, help="for the times of one row")
    parser.add_argument("--match", default="", help="only networks whose name has this in it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, absent = [], dict(NOT_TRIED)
    for name, network in NETWORKS.items():
        for precision in network.precisions if options.match in name else ():
            with tempfile.TemporaryDirectory() as folder:
                try:
                    rows += measure(name, precision, options.seconds, Path(folder), absent)
                except (ValueError, RuntimeError) as error:
                    absent[f"{name}, {precision}"] = str(error).splitlines()[0]
    other = absent.pop("versions", "")
    command = f"python -m benchmarks.export --seconds {options.seconds:g}"
    record = stamped(command=command, rows=rows, absent=absent, onnxruntime_web=other)
    print(table(record))
    if options.match:
        print("not kept: some networks only")
    else:
        save(NAME, record)


if __name__ == "__main__":
    main()
