"""`python -m benchmarks.evidence --cifar10 DATA`: do every step that has no record yet."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from benchmarks.evidence import claims, conversions, speed, students, teachers
from benchmarks.evidence.runner import Step, finished, run
from sepconv.system.allocator import keep_freed_memory


def chosen(steps: Sequence[Step], names: Sequence[str]) -> list[Step]:
    """The steps whose name begins with one of `names`, in the order of `names`; all where there are none."""
    if not names:
        return list(steps)
    found = [step for name in names for step in steps if step.name.startswith(name)]
    return list({step.name: step for step in found}.values())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence", description=__doc__)
    parser.add_argument(
        "names", nargs="*", help="beginnings of the names of the steps to do, in this order (default: all)"
    )
    parser.add_argument("--cifar10", required=True, help="folder with train.parquet and test.parquet")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--list", action="store_true", help="only say which steps there are and which are done")
    options = parser.parse_args()
    teachers.SOURCE["cifar10"] = options.cifar10
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    every = [*teachers.steps(), *conversions.steps(), *students.steps(), *speed.steps(), *claims.steps()]
    steps = chosen(every, options.names)
    if options.list:
        for step in steps:
            print(f"{'done' if finished(step.name) else '    '} {step.name}")
    else:
        run(steps)


if __name__ == "__main__":
    main()
