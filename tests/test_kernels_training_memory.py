"""Kernels of stages in training compute with nothing that nobody has written, and write nothing else."""

from __future__ import annotations

from collections.abc import Iterator

import poison
import pytest
import torch
from stage_checks import channels_last, geometry
from torch import Tensor

from sepconv.kernels import stages
from sepconv.kernels.case import Geometry
from sepconv.kernels.halide.jit import runtime
from sepconv.kernels.prologue import Deviation, Prologue

if runtime.missing() or not poison.possible:
    pytest.skip("no kernels, or no flags of this processor are known", allow_module_level=True)


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    with poison.poisoned():
        stages.forget()
        yield
    stages.forget()


def _prologue(channels: int) -> Prologue:
    return Prologue(torch.randn(channels), torch.rand(channels) + 0.5, torch.randn(channels), "relu6")


@pytest.mark.parametrize(
    ("size", "way"), [((2, 16, 13, 11), geometry()), ((1, 67, 9, 10), geometry(2)), ((3, 16, 3, 2), geometry())]
)
def test_a_stage_and_its_gradients(size: tuple[int, ...], way: Geometry) -> None:
    channels = size[1]
    x, weight, prologue = channels_last(*size), torch.randn(channels, 1, 3, 3), _prologue(channels)
    y, mean, _ = stages.depthwise_stage(x, prologue, weight, None, way, True)
    assert mean is not None
    grad, deviation = torch.randn_like(y), Deviation(y, mean, torch.randn(channels), torch.randn(channels))
    need = (True, True, True)

    def gradients() -> object:
        return stages.depthwise_stage_gradients(grad, deviation, x, prologue, weight, way, need)

    gradients()  # the first call compiles
    assert not poison.meets_tiny_numbers(lambda: stages.depthwise_stage(x, prologue, weight, None, way, True))
    assert not poison.meets_tiny_numbers(gradients)


@pytest.mark.parametrize("size", [(2, 16, 13, 11), (1, 67, 9, 10)])
def test_passes_over_images(size: tuple[int, ...]) -> None:
    x, grad, prologue = channels_last(*size), channels_last(*size), _prologue(size[1])
    for run in (
        lambda: stages.finish(x, prologue),
        lambda: stages.finish_gradients(grad, x, prologue),
        lambda: stages.statistics(x),
    ):
        run()
        assert not poison.meets_tiny_numbers(run)


@pytest.mark.parametrize("channels", [16, 67])
def test_nothing_is_written_beside_the_results(monkeypatch: pytest.MonkeyPatch, channels: int) -> None:
    """Every result is given in the middle of memory that is full of one number."""
    kept: list[tuple[Tensor, int, int]] = []
    empty, margin = torch.empty, 1024

    def within(*sizes: int, memory_format: torch.memory_format = torch.contiguous_format, **options: object) -> Tensor:
        shape = sizes[0] if len(sizes) == 1 and isinstance(sizes[0], (tuple, torch.Size)) else sizes
        plain = empty(shape, device="meta", memory_format=memory_format)
        count = plain.numel()
        memory = torch.full((count + 2 * margin,), 7.0)
        kept.append((memory, margin, count))
        return memory[margin : margin + count].as_strided(plain.shape, plain.stride())

    x, weight, prologue = channels_last(2, channels, 9, 7), torch.randn(channels, 1, 3, 3), _prologue(channels)
    grad = channels_last(2, channels, 5, 4)
    monkeypatch.setattr(torch, "empty", within)
    stages.depthwise_stage(x, prologue, weight, None, geometry(2), True)
    stages.depthwise_stage_gradients(grad, None, x, prologue, weight, geometry(2), (True, True, True))
    stages.finish(x, prologue)
    stages.finish_gradients(x, x, prologue)
    stages.statistics(x)
    assert len(kept) == 10
    for memory, start, count in kept:
        assert not (memory[start : start + count] == 7.0).any()
        assert (memory[:start] == 7.0).all()
        assert (memory[start + count :] == 7.0).all()
