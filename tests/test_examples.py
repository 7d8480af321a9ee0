"""The examples run, and what they show is so."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sepconv.system.threads import threads_set_to

FOLDER = Path(__file__).parent.parent / "examples"
SHOWN: dict[str, Callable[[dict[str, float]], bool]] = {
    "segmentation": lambda r: r["distilled"] < 0.01 and r["separable"] > r["original"] - 0.02 > 0.8,
    "detection": lambda r: r["distilled"] < r["converted"] < 0.6,
    "super_resolution": lambda r: r["to_original"] > 35 and r["separable"] > r["original"] - 0.3,
    "audio": lambda r: r["distilled"] < r["converted"] < 0.8,
    "volumes": lambda r: r["converted"] < 0.05 and r["same"] > 0.9,
}


def test_all_examples_are_run() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} == set(SHOWN)


@pytest.mark.parametrize("name", SHOWN)
def test_an_example_shows_what_it_says(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = importlib.util.spec_from_file_location(f"examples_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, example)
    spec.loader.exec_module(example)
    with threads_set_to(1):
        results = example.main()
    assert SHOWN[name](results), results
    assert "total" in capsys.readouterr().out
    assert f"python examples/{name}.py" in str(example.__doc__)
