"""The machines that networks are exported for: their instruction sets, and what schedules know of them."""

from __future__ import annotations

from dataclasses import dataclass

from sepconv.kernels.halide.schedule.machine import Machine

_ARM_L2, _MEGABYTE = 512 * 1024, 1024 * 1024
_AVX2 = "x86-64-linux-avx-avx2-f16c-fma-sse41"
_AVX512 = "x86-64-linux-avx-avx2-avx512-avx512_skylake-f16c-fma-sse41"
_VNNI = "x86-64-linux-avx-avx2-avx512-avx512_skylake-avx512_cannonlake-avx512_zen4-f16c-fma-sse41"


@dataclass(frozen=True)
class DeviceTarget:
    """A kind of machine.

    Attributes:
        name: as users write it.
        machine: what schedules know of it.
        triple: what LLVM calls it.
        compiler: a C compiler for it, where there is one of that name on this machine.
        runner: what runs its programs on this machine, before their name; empty where that needs nothing.
        needs: what a processor that runs them without it must have, as LLVM calls it.
    """

    name: str
    machine: Machine
    triple: str
    compiler: str = ""
    runner: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()

    @property
    def is_wasm(self) -> bool:
        return self.triple.startswith("wasm32")

    @property
    def is_apple(self) -> bool:
        return "-apple-" in self.triple

    @property
    def pointer_bits(self) -> int:
        return 32 if self.is_wasm else 64


_NEEDS = {
    "": ("sse4.1",),
    "avx2": ("avx2", "fma", "f16c"),
    "avx512": ("avx512f", "avx512bw", "avx512dq", "avx512vl"),
    "avx512-vnni": ("avx512f", "avx512vnni", "avx512bf16"),
}


def _x86(level: str, halide: str, lanes: int, l2: int = _MEGABYTE // 4) -> DeviceTarget:
    name = "x86-64-linux" + (f"-{level}" if level else "")
    # Not the baseline's registers but AVX512's are 32.
    machine = Machine(name, halide, lanes, 32 if lanes == 16 else 16, l2_bytes=l2)
    return DeviceTarget(name, machine, "x86_64-unknown-linux-gnu", "gcc", needs=_NEEDS[level])


def _arm(system: str, triple: str, dot_products: bool, compiler: str = "") -> DeviceTarget:
    name = f"arm-64-{system}" + ("-dotprod" if dot_products and system != "osx" else "")
    halide = f"arm-64-{system}" + ("-arm_dot_prod" if dot_products else "")
    machine = Machine(name, halide, 4, 32, l1_bytes=32 * 1024, l2_bytes=_ARM_L2)
    return DeviceTarget(name, machine, triple, compiler, ("qemu-aarch64", "-L", "/usr/aarch64-linux-gnu"))


def _wasm(name: str, halide: str) -> DeviceTarget:
    return DeviceTarget(name, Machine(name, halide, 4, 16), "wasm32-unknown-unknown", runner=("node",))


_LINUX, _ANDROID, _APPLE = "aarch64-unknown-linux-gnu", "aarch64-linux-android21", "arm64-apple-macosx11.0"
TARGETS = {
    target.name: target
    for target in (
        _x86("", "x86-64-linux-sse41", 4),
        _x86("avx2", _AVX2, 8),
        _x86("avx512", _AVX512, 16, _MEGABYTE),
        _x86("avx512-vnni", _VNNI, 16, _MEGABYTE),
        _arm("linux", _LINUX, False, "aarch64-linux-gnu-gcc"),
        _arm("linux", _LINUX, True, "aarch64-linux-gnu-gcc"),
        _arm("android", _ANDROID, False),
        _arm("android", _ANDROID, True),
        _arm("osx", _APPLE, True),
        _wasm("wasm-32", "wasm-32-wasmrt-wasm_simd128"),
        _wasm("wasm-32-scalar", "wasm-32-wasmrt"),
    )
}


def target_named(name: str) -> DeviceTarget:
    """
    Raises:
        ValueError: there is none of that name.
    """
    if name not in TARGETS:
        raise ValueError(f"export_c: target must be one of {', '.join(TARGETS)}, got {name!r}")
    return TARGETS[name]
