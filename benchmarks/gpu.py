"""`python -m benchmarks.gpu`: the depthwise kernels for GPUs on the card at hand: proven, timed, and written down.

Every case of `sepconv bench ops`, each pass, number type and layout, is proven as in use: compared with PyTorch's
kernel for the same tensors and timed beside it. Nothing that was proven before is asked. Most of the time is spent on
compiling; no case is begun after `--minutes`, and the record says how many were left. It is written after every case.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.record import save, stamped
from sepconv.bench import operations
from sepconv.bench.operations import OpCase, Tensors
from sepconv.kernels import case
from sepconv.kernels.case import Case
from sepconv.kernels.halide.jit import code_cache
from sepconv.kernels.triton import depthwise, events, plan

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
COPIED = 2**28
Row = dict[str, Any]


def copy_gigabytes_per_second(device: torch.device) -> float:
    """Read and written by PyTorch's copy of 256 MB."""
    source = torch.empty(COPIED, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    found = events.measure({"copy": lambda: target.copy_(source)}, device)
    return 2 * COPIED / found["copy"].device / 1e6


def passes(one: OpCase, t: Tensors) -> dict[str, Case]:
    geometry = one.geometry
    return {
        "forward": case.depthwise(t.x, t.weight, t.bias, geometry),
        "grad_input": case.depthwise_grad_input(t.grad, t.weight, t.x.shape, geometry),
        "grad_weight": case.depthwise_grad_weight(t.grad, t.x, t.weight.shape, geometry),
    }


def rows(one: OpCase, dtype: str, copy: float) -> Iterator[Row]:
    for layout, formats in operations._FORMATS.items():
        if len(one.image) not in formats:
            continue
        tensors = operations.make_tensors(one, formats[len(one.image)], DTYPES[dtype], "cuda")
        for which, known in passes(one, tensors).items():
            reason = depthwise.supports(known) or depthwise.slower(known)
            verdict = depthwise.verdict(known)
            moved = operations._bytes(one, DTYPES[dtype].itemsize)
            share = moved / verdict.ours.device / 1e6 / copy if verdict.ours.device else 0.0
            yield {
                "case": one.name, "pass": which, "dtype": dtype, "layout": layout, "used": not reason,
                "reason": reason, "ours_ms": verdict.ours.device, "torch_ms": verdict.pytorch.device,
                "ours_call_ms": verdict.ours.call, "torch_call_ms": verdict.pytorch.call,
                "bytes": moved, "share_of_copy": round(share, 3),
                "tile": plan.schedules(known)[verdict.schedule].tile._asdict(),
            }  # fmt: skip


def summary(found: list[Row]) -> dict[str, float]:
    """Per number type the geometric mean over PyTorch's better layout of all three passes together, losses included:
    each contender in its better layout, ours where it is used. A layout without times of all passes is left out."""
    means = {}
    timed = Counter((row["dtype"], row["case"], row["layout"]) for row in found if row["torch_ms"])
    for dtype in DTYPES:
        sums: dict[str, dict[tuple[str, str], float]] = {}
        for row in found:
            if row["dtype"] == dtype and timed[dtype, row["case"], row["layout"]] == len(operations.PASSES):
                used = row["ours_ms"] if row["used"] else row["torch_ms"]
                for who, ms in (("torch", row["torch_ms"]), ("sepconv", used)):
                    times = sums.setdefault(row["case"], {})
                    times[who, row["layout"]] = times.get((who, row["layout"]), 0.0) + ms
        best = [
            min(ms for (who, _), ms in times.items() if who == "torch")
            / min(ms for (who, _), ms in times.items() if who == "sepconv")
            for times in sums.values()
        ]
        if best:
            means[dtype] = round(statistics.geometric_mean(best), 3)
    return means


def measure(wanted: list[tuple[str, OpCase]], copy: float, minutes: float, name: str) -> list[Row]:
    """The rows of all cases that are begun in time; what there is so far is on disk."""
    found: list[Row] = []
    end = time.monotonic() + 60 * minutes
    for done, (dtype, one) in enumerate(wanted):
        if time.monotonic() >= end:
            print(f"{len(wanted) - done} of {len(wanted)} cases are left after {minutes:g} minutes")
            break
        for row in rows(one, dtype, copy):
            found.append(row)
            times = f"{row['ours_ms']:.4f} ms, PyTorch {row['torch_ms']:.4f} ms"
            print(one.name, dtype, row["layout"], row["pass"], times, row["reason"], flush=True)
        left, means = len(wanted) - done - 1, summary(found)
        save(name, stamped(copy_gb_per_s=round(copy, 1), geometric_means=means, cases_left=left, records=found))
    return found


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--match", default="", help="only cases with this in their name")
    parser.add_argument("--dtypes", default=",".join(DTYPES), help="number types, by commas")
    parser.add_argument("--minutes", type=float, default=9.0, help="no case is begun after them")
    options = parser.parse_args()
    options.dtypes = options.dtypes.split(",")
    if unknown := set(options.dtypes) - set(DTYPES):
        parser.error(f"--dtypes must be of {', '.join(DTYPES)}, but got {', '.join(sorted(unknown))}")
    return options


def main() -> None:
    options = parsed()
    reason = "there is no GPU that this PyTorch can use" if not torch.cuda.is_available() else depthwise.missing()
    if reason:
        sys.exit(f"benchmarks.gpu: {reason}")
    wanted = [(dtype, one) for dtype in options.dtypes for one in operations.CASES if options.match in one.name]
    if not wanted:
        sys.exit(f"benchmarks.gpu: no case has {options.match!r} in its name")
    device = torch.device("cuda", torch.cuda.current_device())
    name = "gpu-" + "-".join(torch.cuda.get_device_name(device).lower().replace("/", " ").split())
    with tempfile.TemporaryDirectory() as folder:
        os.environ[code_cache.VARIABLE] = folder
        print(summary(measure(wanted, copy_gigabytes_per_second(device), options.minutes, name)))


if __name__ == "__main__":
    main()
