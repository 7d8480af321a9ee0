"""How far a long piece of work is: what it tells whoever shows it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """Progress of one stage.

    Attributes:
        stage: what is being done, such as "train" or "convert".
        done, total: steps of this stage; `done == total` is its end.
        loss: of the last batches, while training.
        accuracy: on held-out images, once known, from 0 to 1.
        error: in its place without classes: of the outputs to the original's, relative to their variance.
    """

    stage: str
    done: int
    total: int
    loss: float | None = None
    accuracy: float | None = None
    error: float | None = None


OnProgress = Callable[[Step], None]


def ignore(step: Step) -> None:
    """For callers that show nothing."""
