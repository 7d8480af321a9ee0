"""What a schedule may know about a processor: vector width, registers, caches, and its Halide target.

``host()`` describes this machine, or the one that kernels are made for meanwhile (``targeting``); ``named()`` others,
to cross-compile for them and read the assembly.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

_CACHE_DIRECTORY = Path("/sys/devices/system/cpu/cpu0/cache")
_DEFAULT_L1 = 32 * 1024
_DEFAULT_L2 = 256 * 1024
_UNITS = {"": 1, "K": 1024, "M": 1024 * 1024}


@dataclass(frozen=True)
class Machine:
    """One processor core as a schedule sees it.

    Attributes:
        name: CPU model, part of the key of tuned schedules.
        target: Halide target string.
        lanes: float32 values in one vector register.
        registers: vector registers the compiler may use.
        l1_bytes, l2_bytes: data caches of one core.
        half_vector_cost: time of an operation on half a vector over half of that on a whole one: 2 where both take
            equally long, near 1 where whole vectors are computed in halves (Zen 4).
    """

    name: str
    target: str
    lanes: int
    registers: int
    l1_bytes: int = _DEFAULT_L1
    l2_bytes: int = _DEFAULT_L2
    half_vector_cost: float = 2.0

    @property
    def whole_avx512(self) -> bool:
        """Whether it computes 16 numbers in the time of 8."""
        return self.lanes == 16 and self.half_vector_cost == 2.0

    @property
    def multiplies_by_lane(self) -> bool:
        """Whether a multiply-add takes any one number of a register as a factor for all lanes (ARM)."""
        return self.target.startswith("arm-64")

    @property
    def extremes_keep_nan(self) -> bool:
        """Whether its maximum and minimum of a number and NaN are NaN (ARM)."""
        return self.target.startswith("arm-64")

    @property
    def broadcast_cost(self) -> float:
        """Time to bring a number into all lanes over that of a multiply-add, as far as it shows.

        AVX-512 and NEON multiply by a number in memory or in another vector; before them x86 takes one instruction more
        for each. (Zen 3, 3x3 layers of ResNet-18: tiles of one vector take 1.3 to 1.7 times as long as others.)
        """
        return 1.0 if self.target.startswith("x86") and "avx512" not in self.target else 0.2


_NAMED = {
    "sse41": Machine("sse41", "x86-64-linux-sse41", 4, 16),
    "avx2": Machine("avx2", "x86-64-linux-avx-avx2-f16c-fma-sse41", 8, 16),
    "avx512": Machine(
        "avx512", "x86-64-linux-avx-avx2-avx512-avx512_skylake-f16c-fma-sse41", 16, 32, l2_bytes=1024 * 1024
    ),
    "neon": Machine("neon", "arm-64-linux", 4, 32, l1_bytes=64 * 1024, l2_bytes=1024 * 1024),
}


def named(name: str) -> Machine:
    """A typical machine of a family: ``sse41``, ``avx2``, ``avx512`` or ``neon``."""
    if name not in _NAMED:
        raise ValueError(f"machine.named: name must be one of {sorted(_NAMED)} but is {name!r}")
    return _NAMED[name]


_targeted: ContextVar[Machine | None] = ContextVar("sepconv_targeted", default=None)


def targeted() -> Machine | None:
    """Another machine that kernels are made for in this context; None where it is this one."""
    return _targeted.get()


@contextmanager
def targeting(machine: Machine) -> Iterator[None]:
    """Choose and schedule kernels for another machine, in this context; what they are called with cannot run here."""
    token = _targeted.set(machine)
    try:
        yield
    finally:
        _targeted.reset(token)


def host() -> Machine:
    """The machine that kernels are made for: this one, unless :func:`targeting` another."""
    return _targeted.get() or _host()


@lru_cache(maxsize=1)
def _host() -> Machine:
    """This machine. Needs Halide (see ``runtime.missing``), which knows the instruction set."""
    import halide as hl

    target = hl.get_host_target()
    return Machine(
        name=cpu_name(),
        target=str(target),
        lanes=target.natural_vector_size(hl.Float(32)),
        registers=_vector_registers(target),
        l1_bytes=cache_bytes(1, _DEFAULT_L1),
        l2_bytes=cache_bytes(2, _DEFAULT_L2),
        half_vector_cost=_half_vector_cost(str(target)),
    )


def _half_vector_cost(target: str) -> float:
    """That of Zen 4 is fitted to MobileNet layers; Zen 5, whose target has Zen 4's features too, has whole units."""
    return 1.2 if "avx512_zen4" in target and "avx512_zen5" not in target else 2.0


def _vector_registers(target: object) -> int:
    return 32 if re.match("arm-64|.*avx512", str(target)) else 16


def cpu_name() -> str:
    """What the processor calls itself; needs no Halide."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def cache_bytes(level: int, default: int) -> int:
    """Size of this core's data (or unified) cache as the Linux kernel reports it, else the default."""
    for index in sorted(_CACHE_DIRECTORY.glob("index*")):
        try:
            kind, found = (index / "type").read_text().strip(), int((index / "level").read_text())
            size = re.fullmatch(r"(\d+)([KM]?)", (index / "size").read_text().strip())
        except (OSError, ValueError):
            continue
        if found == level and kind != "Instruction" and size:
            return int(size[1]) * _UNITS[size[2]]
    return default
