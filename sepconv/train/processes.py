"""How many processes train together, and which one this is."""

from __future__ import annotations

import atexit
import gc
import os

import torch
from accelerate import PartialState
from torch import distributed


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
    if launched > 1:
        # Once, however often this is called: equal handlers are taken back together.
        atexit.unregister(_leave)
        atexit.register(_leave)
    return state


def _leave() -> None:
    """Part from the other processes while Python still runs.

    A thread of gloo that lets go of a tensor later ends the process by SIGABRT, after all work was done.
    """
    gc.collect()  # What still holds the connection, such as DistributedDataParallel.
    if distributed.is_initialized():
        distributed.destroy_process_group()
