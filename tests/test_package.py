"""The package as a whole: its public names, the direction of its imports, and what importing it must not do."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sepconv

ROOT = Path(sepconv.__file__).parent
# Every file stands on one level and may import from lower levels, and from its own level what is listed below.
LEVELS = [
    ["reference", "shapes", "files", "png", "progress", "allocator", "borrowed", "interrupt"],
    ["kernels"],
    ["choices", "environment"],
    ["dispatch"],
    ["direct", "tracing"],
    ["operators"],
    ["gradients"],
    ["apply"],
    ["ops"],
    ["layers", "doctor", "pairs"],
    ["models", "cost", "convert", "compile", "data", "structure", "explanation"],
    ["card"],
    ["train", "model_file", "export"],
    ["bench", "predict", "run_folder"],
    ["measure", "report"],
    ["workflow"],
    ["cli"],
]
BESIDE = {("convert", "cost"), ("compile", "cost")}
PUBLIC = [
    *(f"{kind}Conv{d}d" for kind in ("Depthwise", "Pointwise", "Separable") for d in (1, 2, 3)),
    *(f"{kind}_conv{d}d" for kind in ("depthwise", "pointwise", "separable") for d in (1, 2, 3)),
    "compile",
    "convert",
    "count",
    "doctor",
    "explain",
]


def test_public_names() -> None:
    names = {name for name in vars(sepconv) if not name.startswith("_")}
    modules = {path.stem for path in ROOT.iterdir()} - set(PUBLIC)
    assert sorted(names - modules) == sorted(PUBLIC)


def _level(part: str) -> int:
    [level] = [i for i, parts in enumerate(LEVELS) if part in parts]
    return level


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "sepconv":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sepconv."):
            found.add(str(node.module).split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("sepconv.")}
    return found


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    part = path.relative_to(ROOT).parts[0].removesuffix(".py")
    if part in ("__init__", "__main__"):
        return
    for other in _imports(path) - {part, "__version__"}:
        allowed = _level(other) < _level(part) or (part, other) in BESIDE
        assert allowed, f"{part} must not import {other}"


def test_kernels_know_nothing_of_autograd_and_modules() -> None:
    for path in (ROOT / "kernels").glob("*.py"):
        source = path.read_text()
        assert not re.search(
            r"torch\.nn\b(?!\.functional| import functional)|torch\.(autograd|library|ops\.sepconv)", source
        ), path


def test_import_is_lean() -> None:
    """Importing the library starts no thread pool, no device and none of the libraries that only some commands need."""
    code = (
        "import sys, sepconv, torch\n"
        "heavy = {'datasets', 'sklearn', 'accelerate', 'onnx', 'onnxruntime', 'typer', 'triton'}\n"
        "print(sorted(heavy & set(sys.modules)), torch.cuda.is_initialized())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] False"


def test_modules_are_there_after_one_import() -> None:
    """As the guides and docstrings write them."""
    names = ("models.MobileNetV1", "reference.depthwise_conv", "train.Recipe", "data.Augment")
    used = "; ".join(f"sepconv.{name}" for name in names)
    code = f"import sepconv; {used}; print(hasattr(sepconv, 'nothing_like_it'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_version_and_changelog_agree() -> None:
    changelog = ROOT.parent / "CHANGELOG.md"
    top = re.search(r"^## (\S+)", changelog.read_text(), re.MULTILINE)
    assert top is not None
    assert top.group(1) == sepconv.__version__
