"""`python -m benchmarks.compile_times`: seconds to compile each kernel of the `ops` suite and of both MobileNets.

Every kernel is made anew, with none on disk, and timed until it can be called: Halide, LLVM, and loading.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch

import sepconv
from benchmarks.record import save, stamped
from sepconv.bench import operations
from sepconv.kernels.halide.jit import code_cache, runtime
from sepconv.models import MobileNetV1, MobileNetV2
from sepconv.system.threads import threads_set_to

NAME = "compile_times"
LIMIT = 0.5
KINDS = {"G": "depthwise", "W": "depthwise weight gradient"}
"""Short names in the keys of kernels."""
LAYOUTS = (torch.contiguous_format, torch.channels_last)


def use_all() -> Iterator[str]:
    """Call everything once; the name of what was called."""
    for case in operations.CASES:
        for memory_format in LAYOUTS if len(case.image) == 2 else LAYOUTS[:1]:
            tensors = operations.make_tensors(case, memory_format)
            for call in operations.ours(case, tensors).values():
                call()
        yield case.name
    for network in (MobileNetV1, MobileNetV2):
        for batch in (1, 8):
            sepconv.compile(network().eval(), torch.randn(batch, 3, 224, 224))
            yield f"{network.__name__} b{batch}"


def measure(threads: int) -> list[dict[str, Any]]:
    """A row for each kernel: what it is, and what was called when it was first needed."""
    rows: list[dict[str, Any]] = []
    load = runtime._load

    def timed(entry: Any, place: Any, build: runtime.Build) -> Any:
        begin, work = time.perf_counter(), time.process_time()
        kernel = load(entry, place, build)
        seconds, cpu = time.perf_counter() - begin, time.process_time() - work
        times = {"seconds": round(seconds, 4), "cpu_seconds": round(cpu, 4)}
        rows.append({"kernel": KINDS.get(place[0][0], place[0][0]), "threads": threads, **times})
        return kernel

    runtime.clear_cache()
    runtime._load = timed
    try:
        with threads_set_to(threads), torch.inference_mode():
            for name in use_all():
                for row in rows:
                    row.setdefault("first_needed_by", name)
    finally:
        runtime._load = load
    return rows


def summary(record: dict[str, Any]) -> str:
    lines = ["| kernel | kernels | median, s | slowest, s |", "| --- | ---: | ---: | ---: |"]
    kinds = sorted({row["kernel"] for row in record["rows"]})
    for kind in [*kinds, "all"]:
        times = [row["cpu_seconds"] for row in record["rows"] if kind in (row["kernel"], "all")]
        lines.append(f"| {kind} | {len(times)} | {statistics.median(times):.2f} | {max(times):.2f} |")
    above = sum(row["cpu_seconds"] > LIMIT for row in record["rows"])
    machine = record["machine"]
    where = f"On {machine['cpu']} with {machine['features']}; above {LIMIT} s: {above} of {len(record['rows'])}."
    return "\n".join(lines) + f"\n\n{where}\n"


def main() -> None:
    os.environ[code_cache.VARIABLE] = ""
    sepconv.compile(MobileNetV1(0.25).eval(), torch.randn(1, 3, 32, 32))  # imports and the first use of LLVM
    rows = [row for threads in (1, 2) for row in measure(threads)]
    record = stamped(command="python -m benchmarks.compile_times", rows=rows)
    save(NAME, record)
    print(summary(record))


if __name__ == "__main__":
    main()
