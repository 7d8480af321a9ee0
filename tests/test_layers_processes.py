"""Networks with our layers in two processes that train together."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel
from trainable import errors, gradients, stage

import sepconv

BATCH = 4


def _network(synchronised: bool) -> nn.Module:
    torch.manual_seed(3)
    model = nn.Sequential(
        *stage(3, 16, 3), *stage(16, 16, 3, groups=16), *stage(16, 32), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    return nn.SyncBatchNorm.convert_sync_batchnorm(model) if synchronised else model


def _images() -> Tensor:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2 * BATCH, 3, 24, 24, generator=generator)
    return x.contiguous(memory_format=torch.channels_last)


def _found(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Grad strides do not match")  # PyTorch's own convolutions
        found = gradients(DistributedDataParallel(model), x)
    return {name.removeprefix("module."): t.clone() for name, t in found.items()}


def _process(rank: int, folder: str, synchronised: bool) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    try:
        plain = _network(synchronised)
        ours = copy.deepcopy(plain)
        sepconv.replace_layers(ours)
        x = _images()[rank * BATCH : (rank + 1) * BATCH]
        if synchronised:
            for model in (plain, ours):
                with pytest.raises(ValueError, match="SyncBatchNorm expected input tensor to be on"):
                    model(x)
            return
        expected, found = _found(plain, x), _found(ours, x)
        with sepconv.ops.explain.record() as choices:
            gradients(ours, x)
        said = [f"{choice.op} {choice.kernel}" for choice in choices]
        torch.save({"expected": expected, "found": found, "choices": said}, Path(folder) / f"{rank}.pt")
    finally:
        distributed.destroy_process_group()


@pytest.mark.slow
def test_gradients_of_two_processes(tmp_path: Path) -> None:
    """Those of the plain network, and the same in both."""
    multiprocessing.spawn(_process, (str(tmp_path), False), nprocs=2)
    both = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for one in both:
        assert max(errors(one["found"], {name: t.double() for name, t in one["expected"].items()}).values()) < 1e-3
        assert "depthwise_stage halide" in one["choices"]
    for name, _ in _network(False).named_parameters():
        assert torch.equal(both[0]["found"][name], both[1]["found"][name]), name


@pytest.mark.slow
def test_synchronised_norms_of_two_processes_are_for_gpus_as_in_pytorch(tmp_path: Path) -> None:
    multiprocessing.spawn(_process, (str(tmp_path), True), nprocs=2)
