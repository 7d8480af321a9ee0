"""Machine code into this process, by LLVM (llvmlite): from LLVM's language, or from object code made before."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from sepconv.kernels.halide.jit import forks

_engines: list[Any] = []  # assembled code lives as long as its engine, which is for ever


@lru_cache(maxsize=1)
def missing() -> str:
    """Why no machine code can be loaded here, in a sentence; the empty string if it can."""
    try:
        import llvmlite.binding as llvm
    except ImportError as error:
        return f"the llvmlite package cannot be imported ({error}); pip install llvmlite"
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return ""


@lru_cache(maxsize=1)
def _features() -> dict[str, bool]:
    import llvmlite.binding as llvm

    return dict(llvm.get_host_cpu_features())


def host_has(feature: str) -> bool:
    """Whether the processor has what LLVM calls by this name."""
    return not missing() and _features().get(feature, False)


def _engine(code: str) -> Any:
    if missing():
        raise RuntimeError(missing())
    import llvmlite.binding as llvm

    module = llvm.parse_assembly(code)
    module.verify()
    machine = llvm.Target.from_default_triple().create_target_machine(opt=2)
    # The parts of an object reach each other over 2 GiB at most, and LLVM ends the process where they lie farther
    # apart. This manager of memory lays them side by side.
    return llvm.create_mcjit_compiler(module, machine, use_lmm=True)


def assemble(code: str, *names: str) -> list[int]:
    """The addresses of the functions ``names`` of a program in LLVM's language; it stays for ever."""
    with forks.undivided():
        engine = _engine(code)
        engine.finalize_object()
        _engines.append(engine)
        return [int(engine.get_function_address(name)) for name in names]


def define(name: str, address: int) -> None:
    """Let object code that is loaded from now on call the function ``name``."""
    import llvmlite.binding as llvm

    llvm.add_symbol(name, address)


def load(code: bytes, *names: str) -> tuple[Any, list[int]]:
    """The engine that holds object code, and the addresses of its functions ``names``.

    The code goes with :func:`unload`. Every function it calls has to be defined: LLVM ends the
    process otherwise.
    """
    import llvmlite.binding as llvm

    engine = _engine("")
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    return engine, [int(engine.get_function_address(name)) for name in names]


def unload(engine: Any) -> None:
    """The code of an engine is not called any more."""
    with forks.undivided():
        engine.close()
