"""What may stand beside tensors in a model's arguments and results: constants, which their value says all about.

Other objects have an identity of their own, and may hold tensors that nobody would see: an argument of that kind would
be taken for the same one while its contents change, and a result of that kind would be the example's for ever.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from enum import Enum
from numbers import Number
from types import NoneType
from typing import Any, TypeGuard

import torch
from torch import Tensor

_CONSTANTS = (
    *(Number, str, bytes, NoneType, Enum, range),
    *(torch.Size, torch.dtype, torch.device, torch.layout, torch.memory_format),
)


def is_constant(value: Any) -> TypeGuard[Hashable]:
    return isinstance(value, _CONSTANTS)


def first_unseen(values: Iterable[Any]) -> str:
    """The type of the first value that is neither a tensor nor a constant, "" where there is none."""
    unseen = (value for value in values if not isinstance(value, Tensor) and not is_constant(value))
    return next((type(value).__name__ for value in unseen), "")
