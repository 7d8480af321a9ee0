"""README and benchmarks/README.md show what the committed records say."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "update_tables.py"


def test_documents_follow_from_the_records() -> None:
    for path, text in runpy.run_path(str(SCRIPT))["documents"]().items():
        assert path.read_text() == text, f"run python benchmarks/update_tables.py: {path.name} differs from the records"


@pytest.mark.parametrize("name", ["digits-demo.json", "cifar10-convert.json"])
def test_records_carry_no_paths_of_a_machine(name: str) -> None:
    text = (SCRIPT.parent / "results" / name).read_text()
    assert "/tmp/" not in text
    assert "/home/" not in text
    assert '"command": "sepconv' in text
