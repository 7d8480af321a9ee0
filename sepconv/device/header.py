"""The C header of a library: its functions, and its sizes as constants."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sepconv.device.export import ExportedLibrary

_IMAGE_SIZES = ("CHANNELS", "HEIGHT", "WIDTH")
_TEXT = """/* {name}: a network as C functions, for {target}. In {precision}, {macs:,} multiply-adds a call.

   Input and output are float32 numbers without gaps, the last dimension counting fastest, as PyTorch has them:
{sizes}

   {threads}

   All memory that a call writes to, besides what it is given and a few kilobytes of stack, is one arena: of the
   functions without "_in" a static one, so that one call runs at a time; of those with "_in" one that the caller gives,
   {upper}_ARENA_BYTES bytes that begin at a multiple of 64. Calls with different arenas may run at the same time.

   0 is success. {upper}_REFUSED says that a pointer is null or the arena begins elsewhere. */
#ifndef SEPCONV_{upper}_H
#define SEPCONV_{upper}_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {{
#endif

enum {{
{constants}
}};

int {name}_run({given});
int {name}_run_in(void *arena, {given});
{image}{classes}
#ifdef __cplusplus
}}
#endif

#endif
"""
_IMAGE = """
/* The same for {count} of bytes: {height} rows of {width} pixels of {channels}, normalised as the
   network was trained. */
int {name}_run_image(const uint8_t *pixels, {outputs});
int {name}_run_image_in(void *arena, const uint8_t *pixels, {outputs});
"""
_ALONE = "A call allocates nothing and starts no thread."
_SHARED = """A call computes on {count} threads: it starts {others} (pthread_create) and joins all before it returns.
   Where the system gives fewer, it computes the same. It allocates nothing else."""
_CLASSES = """
/* What each output stands for. */
extern const char *const {name}_classes[{upper}_CLASSES];
"""


def header(library: ExportedLibrary, has_image: bool, classes: int) -> str:
    name, upper = library.name, library.name.upper()
    outputs = ", ".join(f"float *{parameter}" for parameter in parameters("output", len(library.outputs)))
    inputs = ", ".join(f"const float *{parameter}" for parameter in parameters("input", len(library.inputs)))
    constants = {**_sizes("INPUT", library.inputs), **_sizes("OUTPUT", library.outputs)}
    constants |= {"ARENA_BYTES": library.arena_bytes, "REFUSED": -1}
    constants |= {"CLASSES": classes} if classes else {}
    constants |= dict(zip(_IMAGE_SIZES, library.inputs[0][1:], strict=True)) if has_image else {}
    return _TEXT.format(
        name=name,
        upper=upper,
        target=library.target,
        precision=library.precision,
        macs=library.macs,
        threads=_threads(library.threads),
        sizes="\n".join(f"   {parameter}: {_shown(shape)}" for parameter, shape in _named(library)),
        constants=",\n".join(f"  {upper}_{constant} = {value}" for constant, value in constants.items()),
        given=f"{inputs}, {outputs}",
        image=_image(library, outputs) if has_image else "",
        classes=_CLASSES.format(name=name, upper=upper) if classes else "",
    )


def _threads(count: int) -> str:
    others = "a thread" if count == 2 else f"{count - 1} threads"
    return _ALONE if count == 1 else _SHARED.format(count=count, others=others)


def parameters(kind: str, count: int) -> list[str]:
    """Their names: numbered where there are several."""
    return [kind] if count == 1 else [f"{kind}{i}" for i in range(count)]


def _named(library: ExportedLibrary) -> list[tuple[str, tuple[int, ...]]]:
    names = [*parameters("input", len(library.inputs)), *parameters("output", len(library.outputs))]
    return list(zip(names, (*library.inputs, *library.outputs), strict=True))


def _sizes(kind: str, shapes: tuple[tuple[int, ...], ...]) -> dict[str, int]:
    """How many numbers each has."""
    return {
        f"{name.upper()}_SIZE": prod(shape) for name, shape in zip(parameters(kind, len(shapes)), shapes, strict=True)
    }


def _shown(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "one number"


def _image(library: ExportedLibrary, outputs: str) -> str:
    n, c, h, w = library.inputs[0]
    channels = "red, green, blue" if c == 3 else "1 byte" if c == 1 else f"{c} bytes"
    count = "an image" if n == 1 else f"{n} images"
    return _IMAGE.format(name=library.name, count=count, height=h, width=w, channels=channels, outputs=outputs)
