"""A running average of a model's weights, which is often more accurate than the last weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sepconv.layers.borrowed import copied


class WeightAverage(AveragedModel):
    """Exponential moving average of a model's parameters and buffers, norm statistics included.

    The decay starts low (2/11 after the first step) and rises to `decay`, so that the random start is forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(copied(model, "train"), multi_avg_fn=self._move, use_buffers=True)
        self.decay = decay
        self.n_averaged.fill_(1)  # the copy is the first of what is averaged

    def _move(self, averages: Any, values: Any, number: Tensor | int) -> None:
        if averages[0].is_floating_point():
            updates = int(self.n_averaged)  # not `number`, which is on the device and would have to be waited for
            decay = min(self.decay, (1 + updates) / (10 + updates))
            get_ema_multi_avg_fn(decay)(averages, values, number)
        else:
            for average, value in zip(averages, values, strict=True):
                average.copy_(value)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Also what older checkpoints hold: the number of updates, and the tensors by their names in the model."""
        if isinstance(state_dict, Mapping) and state_dict.keys() == {"updates", "tensors"}:
            tensors = {f"module.{name}": tensor for name, tensor in state_dict["tensors"].items()}
            state_dict = {"n_averaged": torch.tensor(state_dict["updates"] + 1), **tensors}
        return super().load_state_dict(state_dict, strict, assign)
