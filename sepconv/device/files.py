"""What lies beside a library: an example, how it is built, and how all of it is written at once or not at all."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sepconv.device import wasm
from sepconv.device.header import header, parameters
from sepconv.device.record import Normalisation
from sepconv.device.targets import DeviceTarget
from sepconv.system.files import check_folder as check_writable
from sepconv.system.files import nearest_folder

if TYPE_CHECKING:
    from sepconv.device.export import ExportedLibrary

MANIFEST = "manifest.json"
_SHAPES = ("inputs", "outputs")
_EXAMPLE = """/* Runs {name} on a file: {reads}. Prints one number of the result in a line. */
#include "{name}.h"

#include <stdio.h>
#include <string.h>

{declared}
int main(int count, char **arguments) {{
  FILE *file;
  int code, i;
  if (count != 2) {{
    fprintf(stderr, "usage: example FILE\\n");
    return 2;
  }}
  file = fopen(arguments[1], "rb");
  if (!file) {{
    fprintf(stderr, "cannot open %s\\n", arguments[1]);
    return 1;
  }}
{read}  fclose(file);
  if (code) {{
    fprintf(stderr, "{name}_run: error %d\\n", code);
    return 1;
  }}
{shown}  return 0;
}}
"""
_RAW = """  if ({test}) {{
    fprintf(stderr, "{upper}: the file is too short\\n");
    return 1;
  }}
  code = {name}_run({given});
"""
_PPM = """  if (fscanf(file, "P{kind} %d %d 255", &width, &height) == 2) {{
    if (fgetc(file) == EOF || width != {w} || height != {h}
        || fread(pixels, 1, sizeof pixels, file) != sizeof pixels) {{
      fprintf(stderr, "the image must have {w} x {h} pixels\\n");
      return 1;
    }}
    code = {name}_run_image(pixels, {outputs});
  }} else {{
    rewind(file);
{raw}  }}
"""
_CMAKE = """cmake_minimum_required(VERSION 3.10)
project({name} C)
{find}
add_library({name} STATIC IMPORTED)
set_target_properties({name} PROPERTIES
  IMPORTED_LOCATION ${{CMAKE_CURRENT_SOURCE_DIR}}/lib{name}.a
  INTERFACE_INCLUDE_DIRECTORIES ${{CMAKE_CURRENT_SOURCE_DIR}})

add_executable({name}_example example.c)
target_link_libraries({name}_example {name} m{threads})
"""
_FIND_THREADS = "set(THREADS_PREFER_PTHREAD_FLAG ON)\nfind_package(Threads REQUIRED)\n"
_README = """# {name}

A network for {target}, which needs nothing else. Written by sepconv.

| | |
|---|---|
| input | {inputs} |
| output | {outputs} |
| computed in | {precision} |
| multiply-adds of a call | {macs:,} |
| code | {code_bytes:,} bytes |
| weights | {weights_bytes:,} bytes |
| memory (arena) | {arena_bytes:,} bytes |
| threads of a call | {threads} |

{how}"""
_FOR_C = """`{name}.h` says how it is called; `example.c` calls it:

```
{build}
```
{other}
Or with CMake: `cmake -B build && cmake --build build`.
"""
_OBJECT = """
`{name}.o` is the same in one object, for programs that want no archive:

```
{build}
```
"""
_FOR_PAGES = """In a page, from a server, or in node (`example.mjs`):

```js
import {{ load }} from "./{name}.mjs";
const network = await load();
console.log(network.run(new Float32Array({size})));
```

`{name}.mjs` says what it takes. Nothing leaves the page.
"""


def texts(
    library: ExportedLibrary, goal: DeviceTarget, normalisation: Normalisation | None, classes: Sequence[str]
) -> dict[str, bytes]:
    """All text files but the manifest, by name."""
    name = library.name
    if goal.is_wasm:
        module = wasm.module(library, normalisation is not None, classes)
        readme = _README.format(**_facts(library), how=_FOR_PAGES.format(name=name, size=prod(library.inputs[0])))
        return {f"{name}.mjs": module.encode(), "README.md": readme.encode()}
    found = {
        f"{name}.h": header(library, normalisation is not None, len(classes)),
        "example.c": _example(library, normalisation is not None, len(classes)),
        "CMakeLists.txt": _cmake(library),
        "README.md": _readme(library, goal),
    }
    return {file: text.encode() for file, text in found.items()}


def _example(library: ExportedLibrary, has_image: bool, classes: int) -> str:
    name, upper = library.name, library.name.upper()
    inputs, outputs = parameters("input", len(library.inputs)), parameters("output", len(library.outputs))
    declared = [f"static float {parameter}[{upper}_{parameter.upper()}_SIZE];" for parameter in (*inputs, *outputs)]
    test = " || ".join(
        f"fread({x}, sizeof {x}[0], {upper}_{x.upper()}_SIZE, file) != {upper}_{x.upper()}_SIZE" for x in inputs
    )
    read, reads = (
        _RAW.format(name=name, upper=name, test=test, given=", ".join((*inputs, *outputs))),
        "raw float32 numbers",
    )
    if has_image and library.inputs[0][0] == 1 and library.inputs[0][1] in (1, 3):
        _, c, h, w = library.inputs[0]
        declared += [f"static uint8_t pixels[{h} * {w} * {c}];", "static int width, height;"]
        raw = "".join(f"  {line}\n" for line in read.splitlines())
        kind = 6 if c == 3 else 5
        read = _PPM.format(kind=kind, w=w, h=h, name=name, outputs=", ".join(outputs), raw=raw)
        reads = f"an image of {w} x {h} pixels ({'PPM' if c == 3 else 'PGM'}), or {reads}"
    return _EXAMPLE.format(
        name=name, reads=reads, declared="\n".join(declared) + "\n", read=read, shown=_shown(library, outputs, classes)
    )


def _shown(library: ExportedLibrary, outputs: Sequence[str], classes: int) -> str:
    upper, lines = library.name.upper(), []
    for output in outputs:
        size = f"{upper}_{output.upper()}_SIZE"
        known = classes and len(outputs) == 1 and library.outputs[0] == (1, classes)
        what = f'"%.9g %s\\n", {output}[i], {library.name}_classes[i]' if known else f'"%.9g\\n", {output}[i]'
        lines += [f"  for (i = 0; i < {size}; i++) {{", f"    printf({what});", "  }"]
    return "\n".join(lines) + "\n"


def _cmake(library: ExportedLibrary) -> str:
    shared = library.threads > 1
    find, threads = (_FIND_THREADS, " Threads::Threads") if shared else ("", "")
    return _CMAKE.format(name=library.name, find=find, threads=threads)


def needed(library: ExportedLibrary) -> list[str]:
    """What a program is linked with besides the library."""
    return ["-lm", *["-pthread"] * (library.threads > 1)]


def _readme(library: ExportedLibrary, goal: DeviceTarget) -> str:
    name, compiled, rest = library.name, f"{goal.compiler or 'cc'} -O2 example.c", " ".join(needed(library))
    build = f"{compiled} -o example -L. -l{name} {rest}"
    alone = _OBJECT.format(name=name, build=f"{compiled} {name}.o -o example {rest}")
    how = _FOR_C.format(name=name, build=build, other="" if goal.is_apple else alone)
    return _README.format(**_facts(library), how=how)


def _facts(library: ExportedLibrary) -> dict[str, Any]:
    shown = {kind: "; ".join("x".join(map(str, shape)) for shape in getattr(library, kind)) for kind in _SHAPES}
    return {**vars(library), **shown}


def check_folder(folder: Path) -> None:
    """Find out before long work whether a library can be written there.

    Raises:
        OSError: the folder cannot be written.
        ValueError: other files are in it, which might have the same names.
    """
    check_writable(folder)
    if folder.is_dir() and any(folder.iterdir()) and not _is_library(folder):
        raise ValueError(f"export_c: the folder {folder} holds other files; give a new one, or that of a library")


def _is_library(folder: Path) -> bool:
    found = _described(folder)
    return "sha256" in found and "arena_bytes" in found


def _described(folder: Path) -> dict[str, Any]:
    """The manifest of the library that is there; empty where there is none."""
    try:
        found = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _left_behind(folder: Path, content: Mapping[str, bytes]) -> list[Path]:
    """Files of the library that was there, which the new one lacks: it has another name, or is for another target."""
    listed = _described(folder).get("files", [])
    names = [name for name in listed if isinstance(name, str)] if isinstance(listed, list) else []
    return [folder / name for name in names if name not in content and Path(name).name == name]


def write(folder: Path, content: Mapping[str, bytes]) -> None:
    """All files, once each is complete; those of an earlier library that the new one lacks are gone.

    Raises:
        OSError: they cannot be written; what was in the folder before is still there.
    """
    above = nearest_folder(folder.absolute().parent)
    try:
        temporary = Path(tempfile.mkdtemp(prefix=".sepconv-", suffix=".partial", dir=above))
        try:
            for name, text in content.items():
                (temporary / name).write_bytes(text)
            folder.mkdir(parents=True, exist_ok=True)
            stale = _left_behind(folder, content)
            for name in content:
                (temporary / name).replace(folder / name)
            for file in stale:
                file.unlink(missing_ok=True)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise OSError(error.errno, f"cannot write {folder}: {error.strerror or error}") from error
