"""What keeps the code habitable: few arguments, names that mean one thing, one home for each thing, tests beside it."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import sepconv

ROOT = Path(sepconv.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
MOST_ARGUMENTS = 9
# The arguments of nn.Conv2d and F.conv2d, in their order.
AS_PYTORCH = {"layers/conv.py: __init__", "layers/separable.py: __init__", "reference.py: separable_conv"}
MOST_LINES = 400


def _functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    yield from (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def _arguments(function: ast.FunctionDef, public: bool) -> int:
    """Keyword options do not count where the function is public: its callers see them by name."""
    given = function.args
    counted = len(given.posonlyargs) + len(given.args) + (0 if public else len(given.kwonlyargs))
    return counted - any(arg.arg in ("self", "cls") for arg in given.args[:1])


def test_functions_take_few_arguments() -> None:
    """Those of the command line are its options."""
    found: list[str] = []
    for path in FILES:
        if path.relative_to(ROOT).parts[0] == "cli":
            continue
        found += [
            f"{path.relative_to(ROOT)}: {function.name}"
            for function in _functions(ast.parse(path.read_text()))
            if _arguments(function, public=not function.name.startswith("_")) > MOST_ARGUMENTS
        ]
    assert set(found) == AS_PYTORCH


def test_a_class_name_means_one_thing() -> None:
    homes = defaultdict(list)
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes[node.name].append(str(path.relative_to(ROOT)))
    assert {name: files for name, files in homes.items() if len(files) > 1} == {}


def test_no_file_is_long_or_a_drawer_for_anything() -> None:
    for path in [*FILES, *Path(__file__).parent.glob("*.py")]:
        assert path.stem not in ("utils", "helpers", "common", "misc"), path
        assert len(path.read_text().splitlines()) <= MOST_LINES, path


def test_only_the_timer_times_contenders() -> None:
    """Others may say how long a run took, but what is compared is timed in one place."""
    for path in FILES:
        if "perf_counter_ns" in path.read_text() or "timeit" in path.read_text():
            assert path == ROOT / "system" / "timing.py", path
