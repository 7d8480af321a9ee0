"""What a training run reports: progress while it runs, one record an epoch, and why it stopped."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sepconv.system.files import replacing

LOG = "log.jsonl"


class TrainingStopped(RuntimeError):
    """The loss or the weights became NaN or infinite; the last good checkpoint is kept."""


@dataclass(frozen=True)
class Progress:
    """Where the training is.

    Args:
        epoch, step: counted from 1, of `epochs` and, in this epoch, of `steps`.
        loss, accuracy: means over the training images of this epoch so far; no accuracy where there are no classes.
        test_accuracy: None until the epoch is over, and without classes.
        test_error: without classes, once the epoch is over: the relative error to the teacher's outputs.
        seconds: since the start of this call.
        remaining: seconds to the end, estimated.
    """

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    accuracy: float | None
    test_accuracy: float | None
    seconds: float
    remaining: float
    test_error: float | None = None


@dataclass
class History:
    """What a training run did.

    Args:
        records: one an epoch, with the keys epoch, step, lr, train_loss, train_accuracy, test_loss, test_accuracy,
            seconds, cpu_seconds (of this process, all threads) and images_per_second; the lines of `log.jsonl`.
            Without classes test_error stands in the place of the accuracies and of test_loss.
        resumed_from: the epochs that an earlier run had finished.
    """

    records: list[dict[str, Any]] = field(default_factory=list)
    resumed_from: int = 0

    @property
    def accuracy(self) -> float:
        """On the test split after the last epoch, from 0 to 1."""
        return float(self.records[-1]["test_accuracy"])

    @property
    def error(self) -> float:
        """Without classes: relative error to the teacher's outputs on the test split after the last epoch."""
        return float(self.records[-1]["test_error"])

    @property
    def seconds(self) -> float:
        """Of all epochs, those before a resumption included."""
        return float(sum(record["seconds"] for record in self.records))

    def check(self) -> None:
        """ValueError unless there is a record of each epoch, as far as the numbers of this class need it."""
        if not isinstance(self.records, list) or not self.records:
            raise ValueError(f"the records are {self.records}")
        for epoch, record in enumerate(self.records, 1):
            score = record["test_error"] if "test_error" in record else record["test_accuracy"]
            if record["epoch"] != epoch or not isinstance(record["seconds"] + score, float):
                raise ValueError(f"the record of epoch {epoch} is {record}")

    def write_log(self, folder: Path) -> None:
        """Write `log.jsonl`, a line an epoch; complete at any moment."""
        with replacing(folder / LOG) as file:
            file.write("".join(json.dumps(record) + "\n" for record in self.records).encode())
