"""How many processes train together, and which one this is."""

from __future__ import annotations

import os

import torch
from accelerate import PartialState


def processes() -> PartialState:
    """The state that `accelerate launch` or `torchrun` gave this process; joins the others at the first call.

    Raises:
        RuntimeError: the launcher started several processes but they do not know of one another.
    """
    # Without a GPU, Accelerate connects the processes (by gloo) only when it is told that the CPU is meant.
    wants_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    state = PartialState(cpu=wants_cpu or not torch.accelerator.is_available())
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if state.num_processes != launched:
        raise RuntimeError(f"train: {launched} processes were launched but {state.num_processes} are connected")
    return state
