"""Records -> the tables of docs/conversion.md and docs/claims.md. Rows whose record does not exist yet are left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

from benchmarks.evidence.conversions import (
    BUDGETS,
    CONTENDERS,
    FEWER_IMAGES,
    MULTIPLIERS,
    RIVAL_MULTIPLIERS,
    STAGES,
)
from benchmarks.evidence.runner import finished, read
from benchmarks.evidence.students import (
    BUDGET,
    HEADLINE,
    RIVALS,
    SEEDS,
    SHORT,
    VARIANTS,
    epochs_from_labels,
)
from benchmarks.evidence.summary import mean, percent, plus_minus, table
from benchmarks.evidence.teachers import TEACHERS
from sepconv.convert.forms import FORMS

TITLES = {
    "vgg": "plain (`vgg_quick`)",
    "resnet": "with shortcuts (`resnet_quick`)",
    "fashion-vgg": "plain, Fashion-MNIST",
    "fashion-resnet": "with shortcuts, Fashion-MNIST",
    "wide": "plain, wider, trained longer",
    "deep": "with shortcuts, twice as wide, trained longer",
    "mixed": "with shortcuts, twice as wide, trained with cutmix",
}


def records(names: Sequence[str]) -> list[dict[str, Any]]:
    return [read(name) for name in names if finished(name)]


def minutes(cpu_seconds: float) -> str:
    return f"{cpu_seconds / 60:.1f}"


def points(accuracy: float, teacher: float) -> str:
    return f"{100 * (accuracy - teacher):+.2f}"


def teachers() -> str:
    rows = [
        [
            TITLES[name],
            percent(found["accuracy"]),
            str(len(found["epochs"])),
            minutes(found["training_cpu_seconds"]),
            f"{found['conv_params']:,}",
            f"{found['macs'] / 1e6:.1f} M",
        ]
        for name in TEACHERS
        for found in records([f"teacher-{name}"])
    ]
    return table(["teacher", "accuracy", "epochs", "core-minutes", "conv weights", "multiply-adds"], rows)


def without_training(name: str) -> str:
    teacher = read(f"teacher-{name}")
    rows = []
    for key, form in product(BUDGETS, FORMS):
        for found in records([f"{form}-{name}-{key}"]):
            new, free = found["with images"], found["without images"]
            ranks = " ".join(str(rank or "-") for rank in found["ranks"].values())
            rows.append(
                [
                    f"1/{1 / found['budget']:.0f} of {'the MACs' if found['metric'] == 'macs' else 'the weights'}",
                    form,
                    f"1/{teacher['conv_params'] / new['conv_params']:.2f}",
                    f"1/{teacher['macs'] / new['macs']:.2f}",
                    percent(new["accuracy"]),
                    points(new["accuracy"], teacher["accuracy"]),
                    percent(free["accuracy"]),
                    ranks,
                    minutes(new["cpu_seconds"]),
                ]
            )
    header = ["budget", "form", "conv weights", "MACs", "with images", "points", "no images", "M or R", "core-minutes"]
    return table(header, rows)


def norms(name: str) -> str:
    found = records([f"norms-{form}-{name}" for form in FORMS])
    rows = [[r["form"], percent(r["original"]), percent(r["anew"])] for r in found]
    return table(["1/8 of the weights, untrained", "the original's statistics", "taken anew"], rows)


def images(name: str) -> str:
    """The conversion at an eighth that sees all images, and fewer."""
    fewer = records([f"images-{name}-{n}" for n in FEWER_IMAGES])
    if not fewer:
        return ""
    [most] = records([f"separable-{name}-params-1-8"])
    rows = [[str(r["images"]), percent(r["accuracy"]), minutes(r["cpu_seconds"])] for r in fewer]
    rows.append(
        [str(most["images"]), percent(most["with images"]["accuracy"]), minutes(most["with images"]["cpu_seconds"])]
    )
    return table(["unlabelled images", "1/8 of the weights, separable, untrained", "core-minutes"], rows)


def stages(name: str) -> str:
    teacher = read(f"teacher-{name}")
    rows = []
    for form, multipliers in MULTIPLIERS.items():
        for record in records([f"stages-{form}-{name}-m{m}" for m in multipliers]):
            accuracies = {row["stage"]: percent(row["accuracy"]) for row in record["rows"]}
            weights = f"1/{teacher['conv_params'] / record['rows'][0]['conv_params']:.2f}"
            rows.append([str(record["depth_multiplier"]), form, weights, *(accuracies[stage] for stage in STAGES)])
    return table(["M", "form", "conv weights", *STAGES], rows)


def rivals(name: str) -> str:
    lines: dict[str, list[str]] = {}
    for title in CONTENDERS:
        for record in records([f"{title}-{name}-m{m}" for m in RIVAL_MULTIPLIERS]):
            for row in record["rows"]:
                lines.setdefault(row["contender"], []).extend([percent(row["accuracy"]), f"{row['conv_params']:,}"])
    header = [h for m in RIVAL_MULTIPLIERS for h in (f"M = {m}", "conv weights")]
    return table(["instead of each 3x3 convolution", *header], [[name, *cells] for name, cells in lines.items()])


def distilled(name: str) -> str:
    teacher = read(f"teacher-{name}")
    rows = []
    starts = {"converted": "distil", "random weights": "random"}
    for form in FORMS:
        for count in sorted({*SHORT, *HEADLINE.get((name, form), ())}):
            epochs = "1 epoch" if count == 1 else f"{count} epochs"
            for start, kind in starts.items():
                names = [f"{kind}-{form}-{name}-e{count}-s{seed}" for seed in SEEDS]
                rows += _seeds(teacher, f"{form}, {start}, {epochs}", names)
    total = epochs_from_labels(name)
    rows += _seeds(teacher, f"separable, random weights, labels only, {total} epochs", [f"labels-{name}-e{total}"])
    header = ["form, start, distillation", "accuracy", "points", "seeds", "core-minutes", "conv weights"]
    return table(header, rows)


def _seeds(teacher: dict[str, Any], title: str, names: list[str]) -> list[list[str]]:
    found = records(names)
    if not found:
        return []
    accuracies = [r["accuracy"] for r in found]
    return [
        [
            title,
            plus_minus(accuracies),
            points(mean(accuracies), teacher["accuracy"]),
            str(len(found)),
            minutes(mean([r["training_cpu_seconds"] for r in found])),
            f"1/{teacher['conv_params'] / found[0]['conv_params']:.2f}",
        ]
    ]


def variants(name: str) -> str:
    rows = [
        [key, percent(r["accuracy"]), minutes(r["training_cpu_seconds"])]
        for key in VARIANTS.get(name, {})
        for r in records([f"variant-{name}-{key}"])
    ]
    return table(["changed", "accuracy", "core-minutes"], rows)


def rivals_distilled(name: str) -> str:
    rows = [
        [kind, percent(r["accuracy"]), f"{r['conv_params']:,}", minutes(r["training_cpu_seconds"])]
        for kind in RIVALS
        for r in records([f"rival-{name}-{kind}-e2"])
    ]
    return table(["start from the weights alone", "after 2 epochs", "conv weights", "core-minutes"], rows)


SECTIONS: list[tuple[str, Callable[[str], str]]] = [
    ("Without any training, under one budget", without_training),
    ("Batch norms behind converted layers", norms),
    ("The images that the conversion sees", images),
    ("Accuracy after each stage, the same M (bottlenecks: its weights) for all 3x3 convolutions", stages),
    ("Both orders, Tucker and CP at equal weights, without training", rivals),
    (f"Distilled, {BUDGET.replace('params-1-', '1/')} of the conv weights", distilled),
    (
        "One thing changed of the distillation (one epoch, ten with cutmix; separable unless it says bottleneck)",
        variants,
    ),
    ("Rivals with the weights of M = 1, distilled alike", rivals_distilled),
]


def conversion() -> str:
    """The measured part of docs/conversion.md."""
    parts = [teachers()]
    for name in TEACHERS:
        if finished(f"teacher-{name}"):
            measured = [(title, make(name)) for title, make in SECTIONS]
            parts += [f"### Teacher {TITLES[name]}\n"] if any(content for _, content in measured) else []
            for title, content in measured:
                parts += [f"{title}:\n", content] if content else []
    return "\n".join(parts)
