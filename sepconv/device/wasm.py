"""A network for browsers and node: one WebAssembly module, and the ES module that loads it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sepconv.device.export import ExportedLibrary

PROVIDED = ("expf", "logf", "powf", "sqrtf", "floorf", "tanhf", "sinf", "cosf", "memcpy", "memmove", "memset")
"""Functions that the ES module offers to the other."""
_MODULE = """\
// {name}: a network of {macs:,} multiply-adds in {precision}, for browsers and node. Written by sepconv.
//
//   import {{ load }} from "./{name}.mjs";
//   const network = await load();
//   network.run(input);        // Float32Array, {inputs} -> {outputs}
{about}export const inputSizes = {input_sizes};
export const outputSizes = {output_sizes};
export const classes = {classes};

const bytesOf = async (url) => {{
  if (url.protocol !== "file:") return (await fetch(url)).arrayBuffer();
  return (await import("node:fs/promises")).readFile(url);
}};

// `wasm`: the bytes of {name}.wasm, where they do not lie beside this file.
export async function load(wasm) {{
  let memory;
  const bytes = () => new Uint8Array(memory.buffer);
  const env = {{
    expf: Math.exp, logf: Math.log, powf: Math.pow, sqrtf: Math.sqrt, floorf: Math.floor, tanhf: Math.tanh,
    sinf: Math.sin, cosf: Math.cos,
    memcpy: (to, from, count) => (bytes().copyWithin(to, from, from + count), to),
    memmove: (to, from, count) => (bytes().copyWithin(to, from, from + count), to),
    memset: (to, value, count) => (bytes().fill(value, to, to + count), to),
  }};
  const source = wasm ?? (await bytesOf(new URL("./{name}.wasm", import.meta.url)));
  const {{ exports }} = (await WebAssembly.instantiate(source, {{ env }})).instance;
  memory = exports.memory;
  let end = exports.__heap_base.value;
  const places = [...inputSizes, ...outputSizes].map((size) => {{
    const place = (end + 63) & ~63;
    end = place + 4 * size;
    return place;
  }});
  memory.grow(Math.ceil(Math.max(0, end - memory.buffer.byteLength) / 65536));
  const call = (name, given) => {{
    const code = exports["{name}_" + name](...given, ...places.slice(inputSizes.length));
    if (code !== 0) throw new Error("{name}_" + name + ": error " + code);
    const found = outputSizes.map((size, i) => new Float32Array(memory.buffer, places[inputSizes.length + i], size));
    const copies = found.map((output) => output.slice());
    return copies.length === 1 ? copies[0] : copies;
  }};
  return {{
    run: (...inputs) => {{
      inputs.forEach((input, i) => new Float32Array(memory.buffer, places[i], inputSizes[i]).set(input));
      return call("run", places.slice(0, inputSizes.length));
    }},
{image}  }};
}}
"""
_ABOUT = "//   network.runImage(pixels);  // bytes, row after row: {channels}\n"
# An image of bytes is no larger than the same numbers of 32 bits, and is read before these are written.
_IMAGE = """\
    runImage: (pixels) => {{
      const step = pixels.length / {pixels}, place = new Uint8Array(memory.buffer, places[0], {count});
      for (let i = 0; i < {count}; i++) place[i] = pixels[Math.floor(i / {channels}) * step + (i % {channels})];
      return call("run_image", places.slice(0, 1));
    }},
"""


def module(library: ExportedLibrary, has_image: bool, classes: Sequence[str]) -> str:
    """The ES module beside ``NAME.wasm``."""
    inputs, outputs = (list(map(prod, shapes)) for shapes in (library.inputs, library.outputs))
    shown = [", ".join("x".join(map(str, shape)) for shape in shapes) for shapes in (library.inputs, library.outputs)]
    about = image = ""
    if has_image:
        n, c, h, w = library.inputs[0]
        image = _IMAGE.format(pixels=n * h * w, count=n * c * h * w, channels=c)
        about = _ABOUT.format(
            channels="red, green, blue (and alpha, which is passed over)" if c == 3 else f"{c} a pixel"
        )
    return _MODULE.format(
        name=library.name,
        macs=library.macs,
        precision=library.precision,
        inputs=shown[0],
        outputs=shown[1],
        about=about,
        input_sizes=json.dumps(inputs),
        output_sizes=json.dumps(outputs),
        classes=json.dumps(list(classes)),
        image=image,
    )


_CHECK = """\
import {{ readFileSync }} from "node:fs";
import {{ load, inputSizes }} from {module};
const all = new Float32Array(new Uint8Array(readFileSync({file})).buffer);
let from = 0;
const inputs = inputSizes.map((size) => all.subarray(from, (from += size)));
const found = (await load()).run(...inputs);
for (const output of Array.isArray(found) ? found : [found]) for (const number of output) console.log(number);
"""


def check_script(library: ExportedLibrary, file: Path) -> str:
    """A program for node that prints what the network makes of the numbers in a file."""
    module = (library.folder / f"{library.name}.mjs").resolve().as_uri()
    return _CHECK.format(module=json.dumps(module), file=json.dumps(str(file)))
