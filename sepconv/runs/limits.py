"""What the machine of a run can do at most: the roof over its roofline."""

from __future__ import annotations

from sepconv.kernels.halide.jit import runtime
from sepconv.kernels.halide.schedule.peak import copy_gb_per_s, fma_peak_gflops


def limits(threads: int) -> dict[str, dict[str, float]]:
    """Measured in about a second: "fma_peak_gflops", where Halide is there, and "memory_gb_per_s", by thread count.

    Reference: Williams, Waterman & Patterson 2009, "Roofline", Communications of the ACM 52(4).
    """
    found = {"memory_gb_per_s": copy_gb_per_s(threads)}
    if not runtime.missing():
        found["fma_peak_gflops"] = fma_peak_gflops(threads)
    return {name: {str(threads): round(value, 1)} for name, value in sorted(found.items())}
