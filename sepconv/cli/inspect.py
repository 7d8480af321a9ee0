"""The commands that look: count, doctor, report, bench."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from sepconv.bench import network, tables, training, training_tables, tune, zoo
from sepconv.bench.operations import DEVICES, DTYPES, suite_name
from sepconv.bench.run import run as run_suite
from sepconv.cli import arguments, options, show
from sepconv.cli.app import Commands, app
from sepconv.cli.console import Screen
from sepconv.cli.guard import guarded
from sepconv.cost import count
from sepconv.kernels.halide.schedule import tuned
from sepconv.report import page_of, write_report
from sepconv.runs.model_file import open_model
from sepconv.system.allocator import keep_freed_memory
from sepconv.system.doctor import doctor
from sepconv.system.threads import MOST as MOST_THREADS


@app.command("count", epilog="Example: sepconv count mobilenet_v1 --input 3x224x224 --set width_mult=0.5")
@guarded
def count_command(
    model: options.Model,
    shape: options.InputShape = None,
    weights: options.Weights = None,
    settings: options.Settings = None,
    json_file: options.JsonFile = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Parameters and multiply-adds of a network, per layer, without computing it."""
    screen = Screen(quiet, json_file)
    arguments.check_outputs(arguments.inputs(model, weights), json=json_file)
    network, card = open_model(model, weights, arguments.parse_settings(settings or ()))
    found = count(network, arguments.shape_of(shape, card))
    show.cost(screen, card.model, found)
    totals = {"separable_params": found.separable_params, "separable_macs": found.separable_macs}
    screen.result({"model": card.model, **asdict(found), **totals})


@app.command("doctor", epilog="Example: sepconv doctor --json doctor.json")
@guarded
def doctor_command(
    json_file: options.JsonFile = None, quiet: options.Quiet = False, debug: options.Debug = False
) -> None:
    """What is installed, which kernels run here, what is missing and how to get it."""
    screen = Screen(quiet, json_file)
    arguments.check_outputs([], json=json_file)
    found = doctor()
    show.diagnosis(screen, found)
    screen.result(found.as_dict())


@app.command("report", epilog="Example: sepconv report demo")
@guarded
def report_command(
    folder: Annotated[
        Path,
        typer.Argument(
            parser=options.path, metavar="DIR", help="Folder of a run, or one benchmark file.", show_default=False
        ),
    ],
    json_file: options.JsonFile = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Write the page of a run or of benchmarks from their JSON files."""
    screen = Screen(quiet, json_file)
    arguments.check_outputs([folder], taken=[page_of(folder)], json=json_file)
    page = write_report(folder)
    screen.say(f"Written: {page}")
    screen.result({"report": str(page)})


bench_app = Commands(help="Measure against PyTorch and other runtimes.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")

SuiteFile = Annotated[
    Path, typer.Option("--json", parser=options.path, metavar="FILE", help="The benchmark file to write.")
]
SuiteThreads = Annotated[str, typer.Option("--threads", metavar="N,N", help="Thread counts, one after the other.")]
SuiteSeconds = Annotated[
    float, typer.Option("--seconds", callback=options.finite, help="Of measuring, for each case and pass.")
]
SuiteMatch = Annotated[str, typer.Option("--match", help="Only cases with this in their name.", show_default=False)]


@bench_app.command("ops", epilog="Example: sepconv bench ops --threads 1,2 --json ops.json")
@guarded
def bench_ops(
    json_file: SuiteFile,
    threads: SuiteThreads = "1",
    seconds: SuiteSeconds = 1.0,
    match: SuiteMatch = "",
    dtype: Annotated[str, typer.Option("--dtype", help="Of all numbers: float32 or bfloat16.")] = "float32",
    device: Annotated[str, typer.Option("--device", help="cpu or cuda.")] = "cpu",
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Depthwise convolutions of every kind, each pass, against PyTorch in both layouts."""
    if dtype not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, but got {dtype!r}")
    if device not in DEVICES:
        raise ValueError(f"--device must be one of {', '.join(DEVICES)}, but got {device!r}")
    called = f"ops --dtype {dtype}" + (f" --device {device}" if device != "cpu" else "")
    _bench(suite_name(DTYPES[dtype], device), called, json_file, threads, seconds, match, quiet)


@bench_app.command("blocks", epilog="Example: sepconv bench blocks --threads 1,2 --json blocks.json")
@guarded
def bench_blocks(
    json_file: SuiteFile,
    threads: SuiteThreads = "1",
    seconds: SuiteSeconds = 1.0,
    match: SuiteMatch = "",
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Every separable block of MobileNet v1 and v2, batch 1 and 8, against PyTorch in both layouts."""
    _bench("blocks", "blocks", json_file, threads, seconds, match, quiet)


@bench_app.command("network", epilog="Example: sepconv bench network --threads 1,2 --json network.json")
@guarded
def bench_network(
    json_file: SuiteFile,
    threads: SuiteThreads = "1",
    seconds: SuiteSeconds = 3.0,
    match: SuiteMatch = "",
    contenders: Annotated[
        str, typer.Option("--contenders", metavar="NAME,NAME", help="Only these; all if left out.", show_default=False)
    ] = "",
    precision: Annotated[
        str, typer.Option("--precision", metavar="P,P", help="float32, bfloat16 and int8, one after the other.")
    ] = "float32",
    footprints: Annotated[
        bool, typer.Option("--footprints/--no-footprints", help="Also memory and time to be ready, in new processes.")
    ] = True,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Whole MobileNets, batch 1 and 8, against PyTorch and other runtimes, as far as they are installed."""
    screen = _benchmark_screen(quiet, json_file)
    names, precisions = ([one.strip() for one in text.split(",") if one.strip()] for text in (contenders, precision))
    more = {"match": match, "contenders": contenders, "precision": precision}
    command = _called("network", threads, seconds, more) + ("" if footprints else " --no-footprints")
    network.run(_counts(threads), seconds, match, names, precisions, footprints, json_file, command, screen.say)
    if precisions != ["float32"]:
        show.summary(screen, "Answers to images, against float32", tables.agreement(tables.read(json_file)))
    _finish(screen, json_file, tables.networks_summary)


@bench_app.command("training", epilog="Example: sepconv bench training --threads 1,2 --json training.json")
@guarded
def bench_training(
    json_file: SuiteFile,
    threads: SuiteThreads = "1",
    seconds: SuiteSeconds = 10.0,
    match: SuiteMatch = "",
    contenders: Annotated[
        str, typer.Option("--contenders", metavar="NAME,NAME", help="Only these; all if left out.", show_default=False)
    ] = "",
    precision: Annotated[
        str, typer.Option("--precision", metavar="P,P", help="float32 and bfloat16 (autocast), one after the other.")
    ] = "float32",
    memory: Annotated[
        bool, typer.Option("--memory/--no-memory", help="Also memory of a step, in new processes.")
    ] = True,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """One optimizer step of whole networks, against PyTorch in both layouts and torch.compile."""
    screen = _benchmark_screen(quiet, json_file)
    names, precisions = ([one.strip() for one in text.split(",") if one.strip()] for text in (contenders, precision))
    more = {"match": match, "contenders": contenders, "precision": precision}
    command = _called("training", threads, seconds, more) + ("" if memory else " --no-memory")
    keep_freed_memory()  # as commands that train do: where memory happens to lie costs up to a tenth otherwise
    training.run(_counts(threads), seconds, match, names, precisions, memory, json_file, command, screen.say)
    _finish(screen, json_file, training_tables.summary)


@bench_app.command("zoo", epilog="Example: sepconv bench zoo --threads 1,2 --match resnet --json zoo.json")
@guarded
def bench_zoo(
    json_file: SuiteFile,
    threads: SuiteThreads = "1",
    seconds: SuiteSeconds = 3.0,
    match: SuiteMatch = "",
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Forty networks of timm and torchvision, which must be installed, one image, against PyTorch and OpenVINO."""
    screen = _benchmark_screen(quiet, json_file)
    command = _called("zoo", threads, seconds, {"match": match})
    zoo.run(_counts(threads), seconds, match, json_file, command, screen.say)
    _finish(screen, json_file, tables.zoo_summary)


@bench_app.command("tune", epilog="Example: sepconv bench tune mobilenet_v1 --input 3x224x224 --threads 1,2")
@guarded
def bench_tune(
    model: options.Model,
    shape: options.InputShape = None,
    weights: options.Weights = None,
    settings: options.Settings = None,
    batch: options.Batch = 1,
    threads: SuiteThreads = "1",
    seconds: SuiteSeconds = 0.3,
    json_file: options.JsonFile = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Search for faster schedules of a network's kernels, and keep them for this machine."""
    screen = Screen(quiet, json_file)
    arguments.check_outputs(arguments.inputs(model, weights), json=json_file)
    network, card = open_model(model, weights, arguments.parse_settings(settings or ()))
    example = torch.randn(batch, *arguments.shape_of(shape, card))
    found = []
    for done, of, one in tune.run(network.eval(), example, _counts(threads), seconds):
        screen.say(f"{done}/{of} {one.kind} {one.size}, threads={one.threads}: {one.tried} schedules")
        found.append(one)
    show.tuned(screen, found)
    screen.say(f"Kept in {tuned.path()}")
    screen.result({"model": card.model, "kernels": [asdict(one) for one in found], "table": str(tuned.path())})


def _counts(threads: str) -> list[int]:
    parts = [part.strip() for part in threads.split(",")]
    if not all(arguments.is_size(part, MOST_THREADS) for part in parts):
        raise ValueError(
            f"--threads must be positive whole numbers such as 1,2, but got {threads!r} (the most are {MOST_THREADS})"
        )
    return [int(part) for part in parts]


def _bench(suite: str, called: str, path: Path, threads: str, seconds: float, match: str, quiet: bool) -> None:
    counts = _counts(threads)
    screen = _benchmark_screen(quiet, path)
    command = _called(called, threads, seconds, {"match": match})
    run_suite(suite, counts, seconds, match, path, command, lambda done, of, what: screen.say(f"{done}/{of} {what}"))
    _finish(screen, path, tables.blocks_summary if suite == "blocks" else tables.operations_summary)


def _called(what: str, threads: str, seconds: float, given: Mapping[str, str]) -> str:
    """The command for the record: whoever repeats it measures the same cases and contenders."""
    more = (f" --{name} {shlex.quote(text)}" for name, text in given.items() if text not in ("", _DEFAULTS.get(name)))
    return f"sepconv bench {what} --threads {threads} --seconds {seconds:g}" + "".join(more)


_DEFAULTS = {"precision": "float32"}


def _benchmark_screen(quiet: bool, path: Path) -> Screen:
    if path == Path("-") or (path.exists() and not (path.is_file() or path.is_dir())):
        raise ValueError("bench: --json must be a file, the page of the benchmark is written beside it")
    arguments.check_outputs([], taken=[path.with_suffix(".html")] if path.name else [], json=path)
    return Screen(quiet, path)


def _finish(screen: Screen, path: Path, summary: Callable[[dict[str, Any]], tables.Table]) -> None:
    show.summary(screen, f"Summary of {path.name}", summary(tables.read(path)))
    screen.say(f"Written: {path}, {write_report(path)}")
