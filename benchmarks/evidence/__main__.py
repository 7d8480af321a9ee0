"""`python -m benchmarks.evidence --cifar10 DATA`: do every step that has no record yet."""

from __future__ import annotations

import argparse

import torch

from benchmarks.evidence import claims, conversions, speed, students, teachers
from benchmarks.evidence.runner import finished, run


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence", description=__doc__)
    parser.add_argument("names", nargs="*", help="beginnings of the names of the steps to do (default: all)")
    parser.add_argument("--cifar10", required=True, help="folder with train.parquet and test.parquet")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--list", action="store_true", help="only say which steps there are and which are done")
    options = parser.parse_args()
    teachers.SOURCE["cifar10"] = options.cifar10
    torch.set_num_threads(options.threads)
    every = [*teachers.steps(), *conversions.steps(), *students.steps(), *speed.steps(), *claims.steps()]
    steps = [s for s in every if not options.names or s.name.startswith(tuple(options.names))]
    if options.list:
        for step in steps:
            print(f"{'done' if finished(step.name) else '    '} {step.name}")
    else:
        run(steps)


if __name__ == "__main__":
    main()
