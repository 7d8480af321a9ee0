"""One conversion for the test of several processes: `torchrun convert_run.py OUT` or plain `python`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from sepconv.convert import convert
from sepconv.models import create
from sepconv.train.processes import processes


def main(out: Path) -> None:
    torch.set_num_threads(1)
    state = processes()
    torch.manual_seed(0)
    model = create("vgg_small", width_mult=0.25).double()
    # Three batches of up to 128: one process of two sees two of them.
    images = torch.randn(300, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    new, plan = convert(model, images, 1 / 4, sweeps=2)
    ranks = {"ranks": torch.tensor([row.rank for row in plan.layers])}
    save_file({**new.state_dict(), **ranks}, out / f"converted-{state.num_processes}-{state.process_index}.safetensors")
    state.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
