"""What a training tells of itself, as steps of one stage of a longer job."""

from __future__ import annotations

from collections.abc import Callable

from sepconv.system.progress import OnProgress, Step
from sepconv.train import Progress


def relay(on_progress: OnProgress, stage: str) -> Callable[[Progress], None]:
    """For ``train``: its progress as steps of that stage."""

    def tell(now: Progress) -> None:
        done = (now.epoch - 1) * now.steps + now.step
        accuracy = now.accuracy if now.test_accuracy is None else now.test_accuracy
        on_progress(Step(stage, done, now.epochs * now.steps, now.loss, accuracy, now.test_error))

    return tell
