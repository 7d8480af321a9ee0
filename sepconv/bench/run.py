"""Whole suites: all cases and thread counts of one run, into one file."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from sepconv.bench import blocks, operations, records
from sepconv.bench.records import Record
from sepconv.kernels.halide.schedule.peak import fma_peak_gflops

Progress = Callable[[int, int, str], None]
BATCHES = (1, 8)


def run_ops(
    threads: Sequence[int],
    seconds: float,
    match: str,
    progress: Progress,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> list[Record]:
    """Every case of ``operations`` whose name contains ``match``, with numbers of ``dtype`` on ``device``."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("bench ops: there is no GPU that this PyTorch can use; sepconv doctor says what is missing")
    jobs = [(case, n) for n in threads for case in operations.CASES if match in case.name]
    found: list[Record] = []
    for done, (case, n) in enumerate(jobs):
        progress(done, len(jobs), f"{case.name}, threads={n}")
        found += operations.run_case(case, n, seconds, dtype, device)
    return found


def run_blocks(threads: Sequence[int], seconds: float, match: str, progress: Progress) -> list[Record]:
    """Every distinct block of MobileNet v1 and v2 whose name contains ``match``."""
    jobs = [(block, b, n) for n in threads for b in BATCHES for block in blocks.blocks() if match in block.name]
    found: list[Record] = []
    for done, (block, batch, n) in enumerate(jobs):
        progress(done, len(jobs), f"{block.name} batch {batch}, threads={n}")
        found += blocks.run_block(block, batch, n, seconds)
    return found


SUITES: dict[str, Callable[..., list[Record]]] = {
    **{
        operations.suite_name(dtype, device): partial(run_ops, dtype=dtype, device=device)
        for device in operations.DEVICES
        for dtype in operations.DTYPES.values()
    },
    "blocks": run_blocks,
}


def run(
    suite: str, threads: Sequence[int], seconds: float, match: str, path: Path, command: str, progress: Progress
) -> list[Record]:
    """Run a suite and write its file; the FMA peak is measured in the same run, before and after.

    Raises:
        ValueError: there is no such suite or case, or a contender computed something else; nothing is written.
    """
    if suite not in SUITES:
        raise ValueError(f"bench: suite must be one of {', '.join(SUITES)}, got {suite!r}")
    if not threads or min(threads) < 1 or not 0 < seconds < math.inf:
        raise ValueError(f"bench: threads must be positive, seconds above 0, got {list(threads)} and {seconds}")
    # The peak of this machine's processor says nothing of a GPU, and Halide, which measures it, may be missing there.
    measured = [] if suite.startswith("ops-cuda") else threads
    before = {n: fma_peak_gflops(n) for n in measured}
    found = SUITES[suite](threads, seconds, match, progress)
    if not found:
        raise ValueError(f"bench {suite}: no case has {match!r} in its name")
    peaks = {n: max(before[n], fma_peak_gflops(n)) for n in measured}
    counts = {f"{block.name} b{b}": n for block, n in blocks.blocks().items() for b in BATCHES}
    records.write(path, found, peaks, command, counts if suite == "blocks" else None)
    return found
