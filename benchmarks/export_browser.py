"""A network in Chromium: ours as WebAssembly, with and without vectors, in turn with onnxruntime-web, in one page.

One thread each. The page comes from a server of this process, isolated, so that the browser's clock is fine.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import tarfile
import threading
from collections.abc import Mapping
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

import torch
from torch import Tensor

from sepconv.device import ExportedLibrary

PACKAGE = "onnxruntime-web"
OTHER = "onnxruntime-web"
_PARTS = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
_PAGE = """<!DOCTYPE html>
<script type="module">
const asked = ASKED;

async function measured() {
  const input = new Float32Array(asked.size);
  for (let i = 0; i < input.length; i++) input[i] = (i % 17) / 16;
  const runs = {};
  for (const [name, place] of Object.entries(asked.libraries)) {
    const network = await (await import(place)).load();
    runs[name] = async () => network.run(input);
  }
  if (asked.onnx) {
    const ort = await import("/ort/ort.wasm.min.mjs");
    Object.assign(ort.env.wasm, {numThreads: 1, wasmPaths: new URL("/ort/", location).href});
    const session = await ort.InferenceSession.create(asked.onnx, {executionProviders: ["wasm"]});
    runs[OTHER] = async () => {
      const feeds = {[session.inputNames[0]]: new ort.Tensor("float32", input, asked.shape)};
      return (await session.run(feeds))[session.outputNames[0]].data;
    };
  }
  const names = Object.keys(runs), times = {}, answers = {};
  for (const name of names) {
    times[name] = [];
    const until = performance.now() + 500;
    do answers[name] = Array.from(await runs[name]()); while (performance.now() < until);
  }
  const end = performance.now() + asked.seconds * 1e3;
  do {
    for (const name of names) {
      const start = performance.now();
      await runs[name]();
      times[name].push(performance.now() - start);
    }
  } while (performance.now() < end || times[names[0]].length < 20);
  return {times, answers};
}

measured().then((found) => (window.found = found), (fault) => (window.fault = String(fault)));
</script>
"""


class _Handler(SimpleHTTPRequestHandler):
    """Quiet, with the headers that isolate a page."""

    extensions_map: ClassVar[dict[str, str]] = {
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
        ".html": "text/html",
        "": "text/plain",
    }

    def end_headers(self) -> None:
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


def missing() -> str:
    """Why nothing can be measured in a browser here; "" if it can."""
    if not shutil.which("chromium"):
        return "there is no chromium here"
    return "" if importlib.util.find_spec("playwright") else "the package playwright is not installed"


def fetched(folder: Path) -> str:
    """onnxruntime-web in the subfolder "ort"; returns its version, or raises OSError with the reason."""
    if not shutil.which("npm"):
        raise OSError("there is no npm here")
    done = subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=folder, capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise OSError(f"npm pack {PACKAGE} failed: {(done.stderr or done.stdout).strip().splitlines()[-1:]}")
    (folder / "ort").mkdir()
    with tarfile.open(folder / done.stdout.split()[-1]) as content:
        for name in (*(f"package/dist/{part}" for part in _PARTS), "package/package.json"):
            member = content.extractfile(name)
            assert member is not None
            (folder / "ort" / Path(name).name).write_bytes(member.read())
    version: str = json.loads((folder / "ort" / "package.json").read_text())["version"]
    return version


def measured(
    folder: Path, libraries: Mapping[str, ExportedLibrary], onnx: Path | None, seconds: float
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Milliseconds of a call by contender, median and quartiles, and what each answers to one input.

    Args:
        folder: holds all that the page asks for.
    """
    first = next(iter(libraries.values()))
    [shape] = first.inputs
    asked = {
        "libraries": {name: f"/{one.folder.relative_to(folder)}/{one.name}.mjs" for name, one in libraries.items()},
        "onnx": None if onnx is None else f"/{onnx.relative_to(folder)}",
        "shape": shape,
        "size": torch.Size(shape).numel(),
        "seconds": seconds,
    }
    (folder / "index.html").write_text(_PAGE.replace("ASKED", json.dumps(asked)).replace("OTHER", json.dumps(OTHER)))
    found = _opened(folder, seconds)
    answers = {name: torch.tensor(numbers) for name, numbers in found["answers"].items()}
    return {name: _summary(times) for name, times in found["times"].items()}, answers


def _summary(times: list[float]) -> dict[str, Any]:
    ordered = sorted(times)
    low, high = ordered[len(ordered) // 4], ordered[3 * len(ordered) // 4]
    return {
        "median_ms": round(median(ordered), 3),
        "low_ms": round(low, 3),
        "high_ms": round(high, 3),
        "calls": len(ordered),
    }


def _opened(folder: Path, seconds: float) -> dict[str, Any]:
    from playwright.sync_api import sync_playwright

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    try:
        with sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=flags)
            page = browser.new_page()
            page.goto(f"http://127.0.0.1:{server.server_port}/index.html")
            ended = "window.found !== undefined || window.fault !== undefined"
            page.wait_for_function(ended, timeout=(seconds + 120) * 1000, polling=500)
            if fault := page.evaluate("window.fault"):
                raise RuntimeError(f"in the browser: {fault}")
            found: dict[str, Any] = page.evaluate("window.found")
            browser.close()
    finally:
        server.shutdown()
        server.server_close()
    return found


def given(shape: tuple[int, ...]) -> Tensor:
    """What the page gives every contender."""
    return (torch.arange(torch.Size(shape).numel()) % 17).div(16).view(shape)
