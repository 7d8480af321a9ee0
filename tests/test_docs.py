"""The site builds without a warning, every link of it leads somewhere, and it loads nothing from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
check = pytest.importorskip("check", reason="the folder website is not here")


WRITTEN = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks" / "README.md",
    *(ROOT / "docs").rglob("*.md"),
]


@pytest.mark.parametrize("document", WRITTEN, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_are_named_are_there(document: Path) -> None:
    """Python files by their names, folders of the package by their paths."""
    ours, text = ("sepconv", "tests", "benchmarks", "website", "examples"), document.read_text()
    files = {path.name for folder in ours for path in (ROOT / folder).rglob("*.py")}
    named = re.findall(r"`(?:\w+/)*([a-z0-9_]+\.py)`", text)
    folders = re.findall(r"`(sepconv/[\w/]*/)`", text)
    assert [name for name in named if name not in files] == []
    assert [name for name in folders if not (ROOT / name).is_dir()] == []


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("material", reason="the extra docs is not installed")
    target = tmp_path_factory.mktemp("site")
    # A process of its own: the builder sets up logging and reads the docstrings of a fresh import.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(target)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return target


def test_every_link_leads_somewhere_and_nothing_comes_from_elsewhere(site: Path) -> None:
    assert check.faults(site) == []


def test_pages_made_of_code_and_records_say_what_those_say(site: Path) -> None:
    import sepconv

    reference = (site / "reference.html").read_text()
    public = [
        name for name in vars(sepconv) if name[0] != "_" and getattr(sepconv, name).__class__.__name__ != "module"
    ]
    assert len(public) > 20
    assert [name for name in public if f'id="sepconv.{name}"' not in reference] == []
    commands = (site / "commands.html").read_text()
    assert 'id="sepconv-convert"' in commands
    assert "--calibration-images" in commands
    results = (site / "results.html").read_text()
    assert "146,304" in results
    assert "v1 512-512 14px b1" in results
    assert "made separable" in (site / "demo-report.html").read_text()


def test_pages_that_nobody_has_written_are_left_out(tmp_path: Path) -> None:
    hooks = pytest.importorskip("hooks", reason="the extra docs is not installed")
    (tmp_path / "a.md").touch()
    nav = [{"A": "a.md"}, {"Both": [{"B": "b.md"}, {"Results": "results.md"}]}, {"Neither": [{"C": "c.md"}]}]
    assert hooks._existing(nav, tmp_path) == [{"A": "a.md"}, {"Both": [{"Results": "results.md"}]}]


@pytest.mark.parametrize(
    ("source", "markdown", "expected"),
    [
        ("kernels.md", "see [it](../benchmarks/README.md).", "see [it](results.md)."),
        ("kernels.md", "[`pyproject.toml`](../pyproject.toml)", "`pyproject.toml`"),
        ("kernels.md", "[records](../benchmarks/results/ops.json)", "records (`benchmarks/results/ops.json`)"),
        ("guides/a.md", "[here](../kernels.md), [there](../../README.md)", "[here](../kernels.md), [there](index.md)"),
    ],
)
def test_links_out_of_the_folder(source: str, markdown: str, expected: str) -> None:
    hooks = pytest.importorskip("hooks", reason="the extra docs is not installed")

    class Page:
        class file:
            src_uri = source

    assert hooks.on_page_markdown(markdown, Page) == expected


def test_a_docstring_becomes_markdown() -> None:
    from reference import markdown

    doc = """Does ``this``, see :class:`That`.

Args:
    x, y: two numbers
        of any kind.

Shape:
    x: (N, C)

Example:
    >>> 1
    1

Note the end."""
    assert markdown(doc).split("\n\n") == [
        "Does `this`, see `That`.",
        "\n**Args**",
        "- **`x, y`**: two numbers\n    of any kind.",
        "\n**Shape**",
        "```text\nx: (N, C)\n```",
        "\n**Example**",
        "```pycon\n>>> 1\n1\n```",
        "Note the end.",
    ]


PAGES = {
    '<a href="b.html#there">': "",
    '<a href="#here"><p id="here">': "",
    '<a href="https://a.org/">': "",
    '<a href="folder/">': "",
    '<img src="data:image/png;base64,AA">': "",
    '<a href="c.html">': "a.html refers to c.html, which is not there",
    '<a href="b.html#gone">': "a.html refers to b.html#gone, which is not there",
    '<a href="empty/">': "a.html refers to empty/, which is not there",
    '<script src="app.js">': "a.html refers to app.js, which is not there",
    '<script src="https://cdn.org/x.js">': "a.html loads https://cdn.org/x.js from elsewhere",
    '<link href="//fonts.org/x.css">': "a.html loads //fonts.org/x.css from elsewhere",
}


@pytest.mark.parametrize(("html", "fault"), PAGES.items())
def test_what_the_check_finds(tmp_path: Path, html: str, fault: str) -> None:
    for name in ("folder", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "folder" / "index.html").touch()
    (tmp_path / "b.html").write_text("<h1 id=there>")
    (tmp_path / "a.html").write_text(html)
    assert check.faults(tmp_path) == ([fault] if fault else [])


def test_the_check_reads_styles_and_needs_pages(tmp_path: Path) -> None:
    assert check.faults(tmp_path) == [f"{tmp_path} has no pages"]
    (tmp_path / "a.html").touch()
    (tmp_path / "a.css").write_text("@font-face { src: url(https://fonts.org/a.woff2) }")
    assert check.faults(tmp_path) == ["a.css loads from elsewhere"]
