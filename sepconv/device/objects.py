"""The kernels of a recorded network as object code for the machine that they are scheduled for."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from sepconv.device.record import KernelRecipe
from sepconv.kernels.halide.jit import code_cache, machine_code, runtime
from sepconv.kernels.halide.jit.runtime import hl

_PROVIDED = {"halide_malloc", "halide_free", "halide_do_par_for"}


class KernelObject(NamedTuple):
    """A kernel's function, by its symbol, in an object of its own."""

    symbol: str
    code: bytes


def compiled(name: str, recipes: Sequence[KernelRecipe]) -> Iterator[KernelObject]:
    """For the machine that kernels are made for in this context; symbols begin with the network's name.

    Raises:
        RuntimeError: Halide cannot compile a kernel for it, or the code needs a function that the library has not.
    """
    for number, recipe in enumerate(recipes):
        kind = recipe.key[0] if isinstance(recipe.key, tuple) and isinstance(recipe.key[0], str) else "kernel"
        symbol = f"{name}_{number}_{re.sub(r'[^a-z0-9]+', '_', str(kind).lower())}"
        code = _code(symbol, recipe)
        unknown = set(re.findall(rb"halide_[a-z0-9_]+", code)) - {known.encode() for known in _PROVIDED}
        if unknown:
            raise RuntimeError(f"{symbol} calls {', '.join(sorted(name.decode() for name in unknown))}")
        yield KernelObject(symbol, code)


def _code(symbol: str, recipe: KernelRecipe) -> bytes:
    target = runtime.old_target() if recipe.old else runtime.target()
    file = code_cache.path(("named", symbol, recipe.key, recipe.old, runtime.is_shared()), str(target))
    code = None if file is None else code_cache.read(file)
    if code is None:
        func, arguments = recipe.build()
        code = machine_code.compile_named(hl.Pipeline(func), arguments, symbol, target)
        if file is not None:
            code_cache.write(file, code)
    return code
