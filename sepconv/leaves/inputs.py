"""What a network is called with: positional and keyword arguments, for a batch of samples."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten
from torch.utils.data import Dataset, IterableDataset

TARGETS = ("label", "labels", "target", "targets")
"""Entries of a batch by name that are no arguments of the network but what it should answer."""


@dataclass(frozen=True)
class Inputs:
    """Arguments of one call. The samples lie along the first dimension of every tensor.

    Where the tensors have different first sizes, one has none, or some are in a list (as detectors take images), the
    batch can be taken as a whole only.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, batch: Any) -> Inputs:
        """A batch as loaders give it.

        - A tensor is the only argument.
        - A mapping (a dict, what transformers call an encoding) or a dataclass has keyword arguments; its ``labels``
          and ``targets`` are left out, and entries that are None.
        - Of a tuple or list the first element counts, what follows are targets. Where that element is a tuple or list
          itself, it holds the positional arguments: ``((left, right), target)``, or ``((left, right),)``.

        Raises:
            TypeError: it is something else.
        """
        if isinstance(batch, Inputs):
            return batch
        if isinstance(batch, tuple | list) and batch:
            first = batch[0]
            return cls(tuple(first)) if isinstance(first, tuple | list) else cls.of(first)
        if isinstance(batch, Tensor):
            return cls((batch,))
        named = _named(batch)
        if not named:
            raise TypeError(
                f"must be a tensor or batches of tensors (each a tensor, a tuple (inputs, targets), a dict or a "
                f"dataclass), got {type(batch).__name__}"
            )
        return cls((), {name: value for name, value in named.items() if name not in TARGETS and value is not None})

    @property
    def tensors(self) -> list[Tensor]:
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]

    @property
    def tensor(self) -> Tensor | None:
        """The only argument, if it is one tensor."""
        return self.args[0] if len(self.args) == 1 and not self.kwargs and isinstance(self.args[0], Tensor) else None

    @property
    def divisible(self) -> bool:
        """Whether samples can be taken out of the batch."""
        found = self.tensors
        if any(isinstance(value, tuple | list) for value in (*self.args, *self.kwargs.values())):
            return False
        return bool(found) and all(t.dim() > 0 and len(t) == len(found[0]) for t in found)

    @property
    def structure(self) -> Hashable:
        """What two batches have in common that only differ in their numbers and in how many samples they have."""
        found, spec = tree_flatten((self.args, self.kwargs))
        begin = 1 if self.divisible else 0
        kinds = ((leaf.shape[begin:], leaf.dtype) if isinstance(leaf, Tensor) else repr(leaf) for leaf in found)
        return str(spec), *kinds

    @property
    def kind(self) -> Hashable:
        """What two batches have in common that take the same way through a network's code."""
        return self.structure, len(self)

    @property
    def values_per_sample(self) -> int:
        return max(1, sum(t.numel() for t in self.tensors) // max(1, len(self)))

    def __len__(self) -> int:
        found = self.tensors
        listed = next((value for value in self.args if isinstance(value, tuple | list)), None)
        if listed:
            return len(listed)
        return len(found[0]) if found and found[0].dim() else min(1, len(found))

    def __getitem__(self, chosen: slice | Tensor) -> Inputs:
        """Some samples; the whole batch where they cannot be told apart."""
        return self.map(lambda t: t[chosen]) if self.divisible else self

    def __str__(self) -> str:
        """The shapes, such as ``(2, 3, 8, 8)`` or ``left (2, 3, 8, 8), right (2, 1)``."""
        return ", ".join([*map(_shape, self.args), *(f"{name} {_shape(value)}" for name, value in self.kwargs.items())])

    def map(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        args, kwargs = tree_map_only(Tensor, change, (self.args, self.kwargs))
        return Inputs(args, kwargs)

    def to(
        self, device: torch.device, dtype: torch.dtype | None = None, memory_format: torch.memory_format | None = None
    ) -> Inputs:
        """On a device; numbers with fractions as ``dtype``, images (N, C, H, W) in a memory format."""

        def move(t: Tensor) -> Tensor:
            t = t.to(device, dtype if t.is_floating_point() else None, non_blocking=True)
            return t if memory_format is None or t.dim() != 4 else t.to(memory_format=memory_format)

        return self.map(move)

    def clone(self) -> Inputs:
        return self.map(torch.clone)

    def run(self, model: Callable[..., Any]) -> Any:
        """What the model answers; it may change its arguments in place, so it gets its own."""
        mine = self.clone()
        return model(*mine.args, **mine.kwargs)


def refuse_single_samples(source: Any, name: str) -> None:
    """TypeError for a data set without a loader around it, whose samples would be taken for batches."""
    if isinstance(source, Dataset) and not isinstance(source, IterableDataset):
        raise TypeError(
            f"{name} must give batches, but {type(source).__name__} is a data set of single samples: give "
            "torch.utils.data.DataLoader(dataset, batch_size)"
        )


def joined(batches: Sequence[Inputs]) -> Inputs:
    """One batch of the samples of several, which have one structure."""
    if len(batches) == 1:
        return batches[0]
    flat = [tree_flatten((batch.args, batch.kwargs)) for batch in batches]
    spec = flat[0][1]
    columns = zip(*(found for found, _ in flat), strict=True)
    args, kwargs = tree_unflatten([torch.cat(c) if isinstance(c[0], Tensor) else c[0] for c in columns], spec)
    return Inputs(args, kwargs)


def labels_of(batch: Any) -> Tensor | None:
    """The classes in a batch as loaders give it, int64 (N,); None where it has none."""
    if isinstance(batch, tuple | list):
        found = batch[1] if len(batch) == 2 else None
    elif isinstance(batch, Inputs | Tensor):
        return None
    else:
        named = _named(batch)
        found = next((named[name] for name in TARGETS if name in named), None)
    is_class = isinstance(found, Tensor) and found.dim() == 1 and not found.is_floating_point()
    return found.long() if is_class else None  # type: ignore[union-attr]


def _named(batch: Any) -> dict[str, Any]:
    if isinstance(batch, Mapping):
        return dict(batch)
    if is_dataclass(batch) and not isinstance(batch, type):
        return {entry.name: getattr(batch, entry.name) for entry in fields(batch)}
    return {}


def _shape(value: Any) -> str:
    found = [str(tuple(leaf.shape)) for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    return " and ".join(found) or repr(value)
