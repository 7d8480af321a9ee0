"""From the files of a run to one self-contained HTML file."""

from __future__ import annotations

import base64
import hashlib
import json
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from sepconv.report import charts, facts, formats, plots, records, suites, words
from sepconv.report.records import EXPLANATION, LIVE, Run, dicts, items, mapping, number, text
from sepconv.system.files import replacing

REPORT = "report.html"
SCRIPTS = ("page.js", "arithmetic.js", "drawing.js", "explanation.js")
LIVE_SCRIPTS = ("pixels.js", "network.js", "live.js")


def write_report(run: str | Path) -> Path:
    """Write the page of a run into its folder, from the JSON files there (see :mod:`sepconv.report`).

    The page needs no network and no other file. It appears under its name only when it is complete.

    Args:
        run: the folder that ``sepconv demo``, ``convert`` or ``train`` wrote to, or any with benchmark files: it gets
            ``report.html``. Or one benchmark file, such as ``ops.json``: its page stands beside it as ``ops.html``.

    Returns:
        The path of the page.

    Raises:
        ValueError: there is neither ``result.json`` nor a benchmark file, or a file is damaged; the message names it.
        OSError: the folder cannot be written.
    """
    source = Path(run)
    target = page_of(source)
    if target == source:
        raise ValueError(f"write_report: {source} would be overwritten by its own page: give it another ending")
    page = render(records.read(source))
    with replacing(target) as file:
        # Names of files and arguments may hold what no encoding has.
        file.write(page.encode("utf-8", "backslashreplace"))
    return target


def page_of(source: Path) -> Path:
    """Where the page stands of a run's folder, or of one benchmark file."""
    return source.with_suffix(".html") if source.is_file() else source / REPORT


def render(run: Run) -> str:
    """The page of a run.

    Raises:
        ValueError: the numbers of the explanation are not finite.
    """
    result = run.result
    layers, comparisons = facts.layers(result), facts.comparisons(result)
    live = _live(run.live)
    script = "\n".join(_asset(name) for name in (*SCRIPTS, *(LIVE_SCRIPTS if live else ())))
    return (
        _environment()
        .get_template("page.html")
        .render(
            model=result["model"],
            data=text(result.get("data")),
            command=text(result.get("command")),
            test_images=number(result.get("test_images")),
            converted=bool(mapping(result.get("separable"))),
            bottleneck=result.get("form") == "bottleneck",
            comparisons=comparisons,
            single=facts.single(result),
            lead=words.lead(comparisons, mapping(result.get("closeness"))),
            outputs=facts.outputs(result),
            costs=words.costs(result, layers, comparisons),
            example=words.example(layers),
            latencies=facts.latency_table(result),
            kernels=facts.kernels(result),
            precisions=facts.precisions(result),
            latency_words=words.latencies(facts.latency_table(result)),
            stages_of=facts.stages_of(result),
            notes=[text(note) for note in items(result.get("notes"))],
            stages=words.stages(facts.stages(result), text(result.get("kept"))),
            layers=layers,
            timed=any(None not in row["ms"] for row in layers),
            bars=facts.bars(layers, result.get("other_ms")),
            roofline=plots.roofline(layers, result, run.benchmarks),
            curves=plots.training(dicts(result.get("curves")) or run.log),
            confusion=facts.confusion(result),
            disagreements=facts.disagreements(result),
            disagreement_count=number(result.get("disagreement_count")),
            machine=_plain(result.get("machine")),
            versions=_plain(result.get("versions")),
            suites=suites.suites(run.benchmarks),
            records=facts.raw_records(run.benchmarks),
            left_out=facts.left_out(run.explanation),
            explanation=_script_json(run.explanation, EXPLANATION) if dicts(run.explanation.get("layers")) else "",
            live=live,
            draws=bool(mapping(run.live.get("ink"))),
            style=Markup(_asset("style.css")),
            script=Markup(script),
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        )
    )


def _plain(value: Any) -> dict[str, str]:
    """An object's entries as words; what is none of words, numbers, lists and objects is left out."""
    entries = {key: _written(entry) for key, entry in mapping(value).items()}
    return {key: entry for key, entry in entries.items() if entry}


def _written(entry: Any) -> str:
    """A word or number, a list of them, or numbers by thread count."""
    if isinstance(entry, dict):
        return ", ".join(f"{text(number)} ({_threads(count)})" for count, number in entry.items())
    return ", ".join(map(text, entry)) if isinstance(entry, list) else text(entry)


def _threads(count: str) -> str:
    return f"{count} thread{'' if count == '1' else 's'}"


def _live(found: dict[str, Any]) -> Markup:
    """The networks that the page runs; empty where there are none."""
    return _script_json(found, LIVE) if dicts(found.get("networks")) else Markup()


def _script_json(content: Any, file: str) -> Markup:
    """JSON that may stand in a script element: nothing in it can end the element or open a comment."""
    try:
        written = json.dumps(content, allow_nan=False, separators=(",", ":"))
    except ValueError as error:
        raise ValueError(f"write_report: {file} holds a number that is not finite") from error
    return Markup(written.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


@cache
def _asset(name: str) -> str:
    return Path(__file__).with_name("assets").joinpath(name).read_text(encoding="utf-8")


@lru_cache(maxsize=1)
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("sepconv.report", "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for function in (
        formats.count,
        formats.duration,
        formats.figures,
        formats.milliseconds,
        formats.percent,
        formats.points,
        formats.share,
    ):
        environment.filters[function.__name__] = function
    environment.globals.update(across=charts.across, up=charts.up)
    return environment
