"""The kernels for GPUs in two processes that train together, as far as that goes without one: gloo, and interpreted."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from triton_checks import needs_triton
from triton_pretence import FASTER, pretend

import sepconv
from sepconv.ops import explain

pytestmark = needs_triton

BATCH, STEPS = 2, 2


def _network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(sepconv.DepthwiseConv2d(8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 2, 1))


def _images() -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(2 * BATCH, 8, 5, 6, generator=generator).contiguous(memory_format=torch.channels_last)


def _process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    try:
        with pytest.MonkeyPatch.context() as patch:
            proofs = pretend(patch, Path(folder), FASTER)
            model, x = DistributedDataParallel(_network()), _images()[rank * BATCH : (rank + 1) * BATCH]
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for step in range(STEPS):
                with explain.record() if step == STEPS - 1 else nullcontext([]) as choices:
                    optimizer.zero_grad()
                    model(x).square().mean().backward()
                    optimizer.step()
        weights = {name.removeprefix("module."): t.detach() for name, t in model.named_parameters()}
        said = [f"{choice.op} {choice.kernel}" for choice in choices]
        torch.save({"weights": weights, "choices": said, "proofs": proofs}, Path(folder) / f"{rank}.pt")
    finally:
        distributed.destroy_process_group()


def _alone() -> dict[str, Tensor]:
    """The same steps with all images at once, by PyTorch in float64."""
    model, x = _network().double(), _images().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(STEPS):
        optimizer.zero_grad()
        depthwise, activation, pointwise = model
        hidden = F.conv2d(x, depthwise.weight, depthwise.bias, 1, 1, 1, 8)  # type: ignore[arg-type]
        pointwise(activation(hidden)).square().mean().backward()
        optimizer.step()
    return {name: t.detach() for name, t in model.named_parameters()}


@pytest.mark.slow
def test_two_processes_train_one_network(tmp_path: Path) -> None:
    """Both prove, or find what the other proved; their weights stay the same to the last bit."""
    multiprocessing.spawn(_process, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for name, truth in _alone().items():
        assert torch.equal(first["weights"][name], second["weights"][name]), name
        torch.testing.assert_close(first["weights"][name].double(), truth, rtol=1e-4, atol=1e-5)
    for one in (first, second):
        assert [said.split()[1] for said in one["choices"] if said.startswith("depthwise")] == ["triton"] * 2
        assert len(one["proofs"]) <= 2, "an image needs no gradient"
    assert {*first["proofs"], *second["proofs"]} == {"forward", "grad_weight"}
    assert len(list((tmp_path / "gpu").iterdir())) == 2
