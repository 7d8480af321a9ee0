"""The code of Triton's kernels for GPUs that are not here: registers, spills, and how much a load brings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cases import CASES
from triton_checks import needs_triton

pytestmark = needs_triton

_TARGETS: list[tuple[str, Any]] = [("cuda", 80), ("cuda", 90), ("cuda", 100), ("hip", "gfx942")]
_ON_TARGETS = [
    pytest.param(target, layout, dtype, id=f"{target[1]}-{layout}-{dtype}")
    for target in _TARGETS
    for layout in ("channels_last", "contiguous")
    for dtype in ("float32", "bfloat16", "float16")
]
# Filters and strides on all targets, and on one of each compiler.
_SIZES = [(3, 1), (7, 1), (31, 1)]
_MORE_SIZES = [(3, 2), (5, 1), (13, 1), (21, 1)]
_PASSES = ("forward", "grad_input", "grad_weight")


def _told(wanted: str, tmp_path: Path) -> Any:
    """By a process that interprets nothing, and keeps its code to itself."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    script = Path(__file__).with_name("triton_code.py")
    done = subprocess.run(
        [sys.executable, script, wanted], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _codes(wanted: list[list[Any]], tmp_path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = _told(json.dumps(wanted), tmp_path)
    assert len(found) == len(wanted)
    return found


def _check(wanted: list[list[Any]], tmp_path: Path) -> None:
    for one, code in zip(wanted, _codes(wanted, tmp_path), strict=True):
        assert code["spilled"] == 0, (one, code)
        assert code["registers"] <= (255 if one[0] == "cuda" else 512), (one, code)
        if one[4] != "grad_weight":
            assert code["shared"] == 0, (one, code)
        if one[3] == "channels_last":
            assert code["wide"] == code["loads"] > 0, (one, code)


def test_channels_last_is_read_16_bytes_at_once_and_nothing_is_spilled(tmp_path: Path) -> None:
    _check(
        [["cuda", 90, "bfloat16", "channels_last", which, 3, 1, 0] for which in ("forward", "grad_weight")], tmp_path
    )


@pytest.mark.slow
@pytest.mark.parametrize(("target", "layout", "dtype"), _ON_TARGETS)
def test_on_every_target(target: tuple[str, Any], layout: str, dtype: str, tmp_path: Path) -> None:
    sizes = _SIZES + _MORE_SIZES if target[1] in (90, "gfx942") else _SIZES
    wanted = [[*target, dtype, layout, which, *size, 0] for which in _PASSES for size in sizes]
    volumes = [[*target, dtype, layout, which, 3, 1, 0, 3] for which in _PASSES]
    signals = [[*target, dtype, layout, which, 31, 1, 0, 1] for which in _PASSES[1:]] if layout == "contiguous" else []
    _check([*wanted, *volumes, *signals], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("target", [("cuda", 90), ("hip", "gfx942")], ids=lambda target: str(target[1]))
def test_small_contiguous_images_go_through_no_shared_memory(target: tuple[str, Any], tmp_path: Path) -> None:
    """A tile has several channels of them, whose taps the compiler could load in another order than the pixels.

    As it does with a bias, once a program; a gradient has none.
    """
    sizes = [(3, 2, 7), (7, 2, 14), (31, 1, 40), (3, 3, 7)]
    _check(
        [[*target, "bfloat16", "contiguous", "grad_input", size, 1, 0, dims, 1, side] for size, dims, side in sizes],
        tmp_path,
    )


@pytest.mark.slow
@pytest.mark.parametrize("which", _PASSES)
def test_every_tile_that_is_tried(which: str, tmp_path: Path) -> None:
    [first] = _codes([["cuda", 90, "bfloat16", "channels_last", which, 3, 1, 0]], tmp_path)
    assert first["tiles"] > 1
    tiles = range(1, first["tiles"])
    _check([["cuda", 90, "bfloat16", "channels_last", which, 3, 1, tile] for tile in tiles], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_many_filters_to_a_channel_are_no_more_code(layout: str, tmp_path: Path) -> None:
    """A gradient of the input has a loop over them: written out, 64 of them would compile for minutes."""
    few, many, *others = _codes(
        [
            *(["cuda", 90, "bfloat16", layout, "grad_input", 3, 1, 0, 2, multiplier] for multiplier in (2, 64)),
            *(["cuda", 90, "bfloat16", layout, which, 3, 1, 0, 2, 2] for which in ("forward", "grad_weight")),
        ],
        tmp_path,
    )
    assert few["loads"] == many["loads"] > 0
    assert [code["spilled"] for code in (few, many, *others)] == [0] * 4


@pytest.mark.slow
def test_every_edge_case_compiles(tmp_path: Path) -> None:
    """Sizes and steps of 1 are constants to the compiler, and never to the interpreter."""
    count, spilling = _told("cases", tmp_path)
    assert count > 3 * len(CASES)
    assert spilling == []


@pytest.mark.slow
def test_a_launch_takes_the_arguments_that_it_is_given(tmp_path: Path) -> None:
    """As far as there is no device: types, constants and code for tensors that lie on the CPU."""
    assert _told("launches", tmp_path) == ["gather", "filter_gradient", "add_shares"]
