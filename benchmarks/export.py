"""`python -m benchmarks.export`: networks as C libraries, their sizes, and their times against `sepconv.compile`.

One thread, one image. The library of this machine's own level is called in this process, in turn with the compiled
network; WebAssembly runs in node, whose engine is that of Chromium. Every library has given the model's answer before.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import sepconv
from benchmarks.record import save, stamped
from sepconv.device import ExportedLibrary, check, export_c
from sepconv.device.targets import TARGETS
from sepconv.models import MobileNetV1, MobileNetV2
from sepconv.system.timing import Timing, interleaved

NAME = "export"
CALIBRATION = 32
MEASURED = ("target", "precision", "macs", "code_bytes", "weights_bytes", "arena_bytes", "checked")
LEVELS = ("avx512-vnni", "avx512", "avx2")
_NODE = """
import { load, inputSizes } from MODULE;
const network = await load(), input = new Float32Array(inputSizes[0]).fill(0.5), times = [];
const end = performance.now() + SECONDS * 1e3;
while (performance.now() < end || times.length < 20) {
  const start = performance.now();
  network.run(input);
  times.push(performance.now() - start);
}
times.sort((a, b) => a - b);
console.log(times[Math.floor(times.length / 2)]);
"""


class Network(NamedTuple):
    """A network, the side of its image, and the targets besides this machine that it is exported for."""

    make: Callable[[], nn.Module]
    side: int
    targets: tuple[str, ...] = ("arm-64-linux", "arm-64-linux-dotprod", "wasm-32", "wasm-32-scalar")


NETWORKS = {
    "mobilenet_v1 0.25-128": Network(lambda: MobileNetV1(0.25), 128, ("arm-64-linux", "arm-64-linux-dotprod")),
    "mobilenet_v1 0.5-160": Network(lambda: MobileNetV1(0.5), 160),
    "mobilenet_v1 1.0-224": Network(lambda: MobileNetV1(1.0), 224, ()),
    "mobilenet_v2 1.0-224": Network(lambda: MobileNetV2(1.0), 224),
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


def in_node(library: ExportedLibrary, seconds: float) -> float:
    """Median milliseconds of a call."""
    script = library.folder / "time.mjs"
    module = json.dumps((library.folder / f"{library.name}.mjs").resolve().as_uri())
    script.write_text(_NODE.replace("MODULE", module).replace("SECONDS", str(seconds)))
    done = subprocess.run(["node", str(script)], capture_output=True, text=True, check=True)
    return round(float(done.stdout), 3)


def measure(name: str, precision: str, seconds: float, folder: Path) -> list[dict[str, Any]]:
    """A row for each target."""
    torch.manual_seed(0)
    network = NETWORKS[name]
    model, x = network.make().eval(), torch.randn(1, 3, network.side, network.side)
    if precision == "int8":
        model, _ = sepconv.quantize(model, torch.randn(CALIBRATION, *x.shape[1:]))
    own, rows = own_level(precision), []
    for target in (own, *network.targets):
        library = export_c(model, x, folder / target, target=target, check=True)
        facts = asdict(library)
        rows.append({"network": name, **{key: facts[key] for key in MEASURED}})
        if target == own:
            rows[-1] |= against_compile(library, sepconv.compile(model, x, threads=1), x, seconds)
        elif library.target.startswith("wasm") and shutil.which("node"):
            rows[-1]["node_ms"] = in_node(library, seconds)
        print(json.dumps(rows[-1]), flush=True)
    return rows


def against_compile(
    library: ExportedLibrary, compiled: Callable[[Tensor], Any], x: Tensor, seconds: float
) -> dict[str, Any]:
    times: dict[str, Timing] = interleaved({"library": called(library, x), "compile": lambda: compiled(x)}, seconds)
    ratio = round(times["library"].median_ms / times["compile"].median_ms, 3)
    return {**{f"{name}_ms": asdict(timing) for name, timing in times.items()}, "over_compile": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.export", description=__doc__)
    parser.add_argument("--seconds", type=float, default=6.0, help="for the times of one row")
    parser.add_argument("--match", default="", help="only networks whose name has this in it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in (name for name in NETWORKS if options.match in name):
        for precision in ("float32", "int8"):
            with tempfile.TemporaryDirectory() as folder:
                rows += measure(name, precision, options.seconds, Path(folder))
    command = f"python -m benchmarks.export --seconds {options.seconds:g}"
    if options.match:
        print("not kept: some networks only")
    else:
        save(NAME, stamped(command=command, rows=rows))


if __name__ == "__main__":
    main()
