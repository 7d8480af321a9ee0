"""The machine code for processors that need not be here: wide multiply-adds, nothing spilled in the inner loop."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from sepconv.kernels.halide.conv import pointwise, separable, stem
from sepconv.kernels.halide.conv.gemm import ragged
from sepconv.kernels.halide.conv.separable_pipeline import known, room
from sepconv.kernels.halide.jit import runtime
from sepconv.kernels.halide.schedule import gemm, machine

if runtime.missing():
    pytest.skip(runtime.missing(), allow_module_level=True)

import halide as hl

MACHINES = ["avx2", "avx512", "neon"]

_LABEL = re.compile(r"(\.?L[\w.$]+):")
_BRANCH = re.compile(r"(?:j[a-z]+|b(?:\.\w+)?|cbn?z|tbn?z)\s+(?:[wx]\d+,\s*(?:#\d+,\s*)?)?(\.?L[\w.$]+)$")
_MULTIPLY_ADD = re.compile(r"(vfmadd\w+ps|fmla)\s")
# A fixed place on the stack; scratch arrays may lie there too, but they are indexed by a register.
_SPILL = re.compile(r"\d*\(%rsp\)|\[sp(, #\d+)?\]")


def inner_loops(assembly: str) -> list[list[str]]:
    """Instructions of the loops that contain no other label."""
    lines = [re.split(r"\s*(?:#|//)\s", line)[0].strip() for line in assembly.splitlines()]
    labels = {match[1]: i for i, line in enumerate(lines) if (match := _LABEL.match(line))}
    loops = []
    for i, line in enumerate(lines):
        branch = _BRANCH.match(line)
        start = labels.get(branch[1], i) if branch else i
        body = lines[start + 1 : i + 1]
        if start < i and not any(_LABEL.match(inside) for inside in body):
            loops.append([instruction for instruction in body if instruction])
    return loops


def multiply_adds(loop: list[str]) -> list[str]:
    return [instruction for instruction in loop if _MULTIPLY_ADD.match(instruction)]


def product_loop(pipeline: tuple[Any, list[Any]], processor: machine.Machine, folder: Path) -> list[str]:
    """The inner loop with the most multiply-adds."""
    output, arguments = pipeline
    path = folder / "kernel.s"
    output.compile_to_assembly(str(path), arguments, "kernel", hl.Target(processor.target + "-no_runtime"))
    return max(inner_loops(path.read_text()), key=lambda loop: len(multiply_adds(loop)))


def register_name(processor: machine.Machine, tile: gemm.Tile) -> str:
    if processor.name == "neon":
        return r"v\d+\.4s"
    return {8: r"%ymm\d+", 16: r"%zmm\d+"}[tile.lanes]


def assert_in_registers(loop: list[str], processor: machine.Machine, tile: gemm.Tile, unrolled: int) -> None:
    found = multiply_adds(loop)
    assert len(found) == tile.vectors * tile.scalars * unrolled
    assert all(re.search(register_name(processor, tile), instruction) for instruction in found)
    assert [instruction for instruction in loop if _SPILL.search(instruction)] == []


@pytest.mark.parametrize("name", MACHINES)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_pointwise_inner_loop(name: str, channels_last: bool, tmp_path: Path) -> None:
    processor = machine.named(name)
    plan = gemm.pointwise_schedule(processor, channels_last, 128, 128, 56 * 56, 1, 1)
    spec = pointwise.PointwiseSpec(channels_last, None, None, plan.tile, False, plan.parallel, "relu6", False)
    with machine.targeting(processor):
        loop = product_loop(pointwise.build(spec), processor, tmp_path)
    assert_in_registers(loop, processor, plan.tile, plan.tile.terms)
    if plan.tile.terms > 1:
        assert len(loop) < 1.25 * len(multiply_adds(loop))


@pytest.mark.parametrize("name", MACHINES)
@pytest.mark.parametrize(("channels", "out_channels"), [(144, 24), (512, 512)])
def test_separable_inner_loop(name: str, channels: int, out_channels: int, tmp_path: Path) -> None:
    processor = machine.named(name)
    plan = gemm.separable_schedule(processor, channels, 1, out_channels, 1, (14, 14), 1, 1)
    streams = gemm.streams(processor, channels, out_channels)
    spec = separable.SeparableSpec(
        known(channels, streams), room(channels), 1, ragged(out_channels, plan.tile.wide), (3, 3), (1, 1), (1, 1),
        plan.tile, plan.columns, plan.depthwise_lanes, plan.parallel, "relu6", "relu6", False, streams,
    )  # fmt: skip
    assert streams == (4 if channels == 512 and name != "neon" else 1)
    assert plan.tile.terms == (4 if name == "neon" else 1)
    with machine.targeting(processor):
        loop = product_loop(separable.build(spec), processor, tmp_path)
    assert_in_registers(loop, processor, plan.tile, streams * plan.tile.terms)


@pytest.mark.parametrize("name", MACHINES)
def test_stem_inner_loop(name: str, tmp_path: Path) -> None:
    processor = machine.named(name)
    plan = gemm.stem_schedule(processor, 27, 32, 1, (112, 112), 5376, 1)
    spec = stem.StemSpec(False, 3, 32, (3, 3), (2, 2), plan.tile, "relu6")
    with machine.targeting(processor):
        loop = product_loop(stem.build(spec), processor, tmp_path)
    assert_in_registers(loop, processor, plan.tile, spec.channels)


@pytest.mark.parametrize("name", MACHINES)
@pytest.mark.parametrize("wide", [1, 7, 16, 24, 32, 49, 96, 320, 1000, 1024])
def test_tiles_fit_the_registers(name: str, wide: int) -> None:
    processor = machine.named(name)
    tile = gemm.gemm_tile(processor, wide, 256)
    assert tile.vectors * tile.scalars + tile.vectors + 1 <= processor.registers
    assert tile.vectors * tile.scalars >= 10
    assert tile.lanes <= processor.lanes


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("size", [(1, 1), (1, 203), (7, 7), (13, 3), (56, 56), (61, 53)])
def test_separable_schedule_leaves_no_tile_shorter_than_its_registers(size: tuple[int, int], threads: int) -> None:
    for name in MACHINES:
        for channels, out_channels in ((3, 5), (64, 128), (1024, 1024)):
            plan = gemm.separable_schedule(machine.named(name), channels, 1, out_channels, 1, size, 1, threads)
            left = size[0] % plan.rows
            assert plan.rows <= size[0]
            assert plan.tile.scalars <= plan.rows * size[1]
            assert left == 0 or plan.tile.scalars <= left * size[1]
            assert plan.depthwise_lanes <= channels


def test_inner_loops_of_a_known_program() -> None:
    program = "\n".join(
        [".L0:", "  movl %eax, %ebx", ".L1: ", "\tvfmadd231ps %ymm1, %ymm2, %ymm3 # a + b", "\tjne .L1", "\tjne .L0"]
    )
    assert inner_loops(program) == [["vfmadd231ps %ymm1, %ymm2, %ymm3", "jne .L1"]]
    assert _SPILL.search("vmovups 32(%rsp), %ymm0")
    assert not _SPILL.search("vmovaps 384(%rsp,%r15), %ymm8")


@pytest.mark.parametrize(("channels", "side"), [(512, 14), (1024, 7), (960, 7)])
def test_weights_that_l2_cannot_keep_are_read_once(channels: int, side: int) -> None:
    """On one thread; all filtered rows fit the cache beside a block of weights."""
    processor = dataclasses.replace(machine.named("avx2"), l2_bytes=512 * 1024)
    plan = gemm.separable_schedule(processor, channels, 1, channels, 1, (side, side), 1, 1)
    assert plan.rows == side
    assert 4 * channels * side * side <= processor.l2_bytes * 4 // 5


def test_weights_that_l2_keeps_leave_the_rows_most_of_it() -> None:
    processor = dataclasses.replace(machine.named("avx2"), l2_bytes=512 * 1024)
    plan = gemm.separable_schedule(processor, 256, 1, 256, 1, (28, 28), 1, 1)
    assert 4 * 256 * 28 * plan.rows <= processor.l2_bytes * 2 // 5


@pytest.mark.parametrize("name", MACHINES)
@pytest.mark.parametrize(("channels", "out_channels", "side"), [(32, 64, 112), (128, 128, 56), (256, 256, 28)])
def test_depthwise_results_leave_the_cache_to_the_weights(
    name: str, channels: int, out_channels: int, side: int
) -> None:
    processor = machine.named(name)
    plan = gemm.separable_schedule(processor, channels, 1, out_channels, 1, (side, side), 1, 1)
    fits = 4 * channels * out_channels <= processor.l2_bytes // 2
    assert plan.rows == 1 or 4 * plan.rows * side * channels <= processor.l2_bytes // (8 if fits else 1)
    assert plan.rows < side


@pytest.mark.parametrize("step", [1, 4])
def test_the_input_under_a_tile_leaves_room_too(step: int) -> None:
    processor = machine.named("avx512")
    plan = gemm.separable_schedule(processor, 128, 1, 128, 1, (56, 56), step, 1)
    assert 4 * 128 * 56 * plan.rows * (1 + step) <= processor.l2_bytes // 6


@pytest.mark.parametrize("threads", [2, 3, 4])
def test_many_pixels_are_shared_out_evenly(threads: int) -> None:
    """Whatever the chunk that fits the cache, the threads have equally many; channels are for few pixels."""
    for name in MACHINES:
        for pixels in (32 * 32 * 128, 16 * 16 * 128 + 1, 8 * 8 * 128):
            plan = gemm.pointwise_schedule(machine.named(name), True, 128, 128, pixels, 1, threads)
            assert plan.parallel == "pixels"
            chunks = -(-pixels // (plan.chunk * plan.tile.scalars))
            assert -(-chunks // threads) * threads / chunks < 1.05


def test_a_few_pixels_saved_are_no_reason_for_smaller_register_tiles() -> None:
    tile = gemm.Tile(16, 4, 6)
    assert gemm.fit_scalars(tile, 16 * 16 * 128) == tile
    assert gemm.fit_scalars(tile, 10) == tile._replace(scalars=5)


def test_half_vectors_are_for_processors_that_compute_whole_ones_in_halves() -> None:
    whole = machine.named("avx512")
    halved = dataclasses.replace(whole, half_vector_cost=1.2)
    # 24 channels: two whole vectors, or three halves of which none is wasted.
    assert gemm.gemm_tile(whole, 24, 144)[:2] == (16, 2)
    assert gemm.gemm_tile(halved, 24, 144)[:2] == (8, 3)
    assert (gemm.channel_lanes(whole, 24), gemm.channel_lanes(halved, 24)) == (16, 8)


@pytest.mark.parametrize(
    ("features", "cost"),
    [("avx512_zen4", 1.2), ("avx512_zen4-avx512_zen5", 2.0), ("avx512_sapphirerapids", 2.0), ("avx2", 2.0)],
)
def test_zen_4_computes_whole_vectors_in_halves(features: str, cost: float) -> None:
    assert machine._half_vector_cost(f"x86-64-linux-avx-avx2-{features}-fma") == cost


@pytest.mark.parametrize(
    ("channels", "out_channels", "count"),
    [(512, 512, 4), (160, 960, 2), (96, 1000, 1), (514, 512, 2), (511, 512, 1), (128, 128, 1)],
)
def test_large_weights_are_read_in_several_long_runs(channels: int, out_channels: int, count: int) -> None:
    assert gemm.streams(machine.named("avx512"), channels, out_channels) == count
