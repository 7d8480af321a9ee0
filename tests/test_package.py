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
# Every folder stands on one level and may import from lower levels, and from its own level what is listed below. Two
# files about the machine look up at what they report.
LEVELS = [
    ["reference", "activations", "norms", "system", "leaves"],
    ["kernels"],
    ["system.environment"],
    ["ops"],
    ["system.doctor", "layers"],
    ["models", "cost", "convert", "compile", "data"],
    ["quantize", "device"],
    ["train", "report"],
    ["runs"],
    ["bench"],
    ["cli"],
]
BESIDE = {("convert", "cost"), ("convert", "compile"), ("compile", "cost")}
MOST_LOOSE_FILES = 6
PUBLIC = [
    *(f"{kind}Conv{d}d" for kind in ("Depthwise", "Pointwise", "Separable") for d in (1, 2, 3)),
    *(f"{kind}_conv{d}d" for kind in ("depthwise", "pointwise", "separable") for d in (1, 2, 3)),
    "compile",
    "convert",
    "count",
    "doctor",
    "explain",
    "export_c",
    "quantize",
    "replace_layers",
    "restore_layers",
]


def test_public_names() -> None:
    names = {name for name in vars(sepconv) if not name.startswith("_")}
    modules = {path.stem for path in ROOT.iterdir()} - set(PUBLIC)
    assert sorted(names - modules) == sorted(PUBLIC)


def _part(module: str) -> str:
    """The entry of LEVELS that a module belongs to: itself, or the folder that it is in."""
    names = module.split(".")[1:]
    listed = {part for parts in LEVELS for part in parts}
    return next(part for part in (".".join(names[:2]), names[0]) if part in listed)


def _level(part: str) -> int:
    [level] = [i for i, parts in enumerate(LEVELS) if part in parts]
    return level


def _imports(path: Path) -> set[str]:
    """Modules of ours that a file imports anywhere, by their full names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "sepconv":
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("sepconv.")}
    return found - {"sepconv.__version__"}


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    module = ".".join(("sepconv", *path.relative_to(ROOT).with_suffix("").parts))
    if module in ("sepconv.__init__", "sepconv.__main__"):
        return
    part = _part(module)
    for other in {_part(name) for name in _imports(path)} - {part}:
        allowed = _level(other) < _level(part) or (part, other) in BESIDE
        assert allowed, f"{part} must not import {other}"


def test_root_has_few_loose_files() -> None:
    """A folder is one idea; what lies loose in the root has none."""
    loose = [path.name for path in ROOT.iterdir() if path.is_file()]
    assert len(loose) <= MOST_LOOSE_FILES, sorted(loose)


def test_every_folder_says_what_it_is() -> None:
    for folder in {path.parent for path in ROOT.rglob("*.py")}:
        assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text())), folder


def test_kernels_know_nothing_of_autograd_and_modules() -> None:
    for path in (ROOT / "kernels").rglob("*.py"):
        source = path.read_text()
        assert not re.search(
            r"torch\.nn\b(?!\.functional| import functional)|torch\.(autograd|library|ops\.sepconv)", source
        ), path


def test_import_is_lean_and_modules_are_there_after_it() -> None:
    """Importing the library starts no thread pool, no device and none of the libraries that only some commands need;
    nor does a convolution on a CPU.

    Its modules are there as the guides and docstrings write them.
    """
    code = (
        "import sys, sepconv, torch\n"
        "sepconv.depthwise_conv2d(torch.ones(1, 2, 5, 5).double(), torch.ones(2, 1, 3, 3).double())\n"
        "heavy = {'datasets', 'sklearn', 'accelerate', 'onnx', 'onnxruntime', 'typer', 'triton'}\n"
        "print(sorted(heavy & set(sys.modules)), torch.cuda.is_initialized())\n"
        "sepconv.models.MobileNetV1, sepconv.reference.depthwise_conv, sepconv.train.Recipe, sepconv.data.Augment\n"
        "print(hasattr(sepconv, 'nothing_like_it'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n") == ["[] False", "False", ""]


def test_only_the_extra_for_gpus_asks_for_triton() -> None:
    """And the tests, which interpret what nobody could try otherwise."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 brings it")
    project = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())["project"]
    assert not any("triton" in one for one in project["dependencies"])
    extras = project["optional-dependencies"]
    assert [name for name, asked in extras.items() if any("triton" in one for one in asked)] == ["gpu"]
    assert [name for name, asked in extras.items() if any(re.search(r"\bgpu\b", one) for one in asked)] == ["test"]


def test_test_files_are_named_after_what_they_test() -> None:
    """`test_FOLDER_SUBJECT.py`, or the name of something beside the folders of the package."""
    beside = {"package", "names", "docs", "examples", "reference", "activations", "norms", "benchmarks", "newest"}
    folders = {path.name for path in ROOT.iterdir() if (path / "__init__.py").exists()}
    subjects = {path.stem.split("_")[1]: path.name for path in Path(__file__).parent.glob("test_*.py")}
    assert [name for subject, name in subjects.items() if subject not in folders | beside] == []


def test_version_and_changelog_agree() -> None:
    changelog = ROOT.parent / "CHANGELOG.md"
    top = re.search(r"^## (\S+)", changelog.read_text(), re.MULTILINE)
    assert top is not None
    assert top.group(1) == sepconv.__version__
