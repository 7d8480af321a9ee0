"""Operations that PyTorch computes, into memory that is already there: by their ``out`` variant or by a copy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from sepconv.compile.program import Input, Operation

# Beside operations number by number: these write what they should into an output of any strides. That of softmax and
# of tril do not (PyTorch 2.13).
_WRITE_ANY_STRIDES = (
    "cat", "mean", "sum", "amax", "amin", "mm", "addmm", "bmm", "baddbmm", "avg_pool2d", "adaptive_avg_pool2d",
    "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d", "reflection_pad2d", "replication_pad2d", "glu",
    "index_select",
)  # fmt: skip


def operation_call(work: Operation, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Callable[[], object]:
    """The call that fills ``outputs`` from what is then in ``inputs``."""
    args, kwargs = pytree.tree_map_only(Input, lambda place: inputs[place.number], (work.args, work.kwargs))
    variant = _out_variant(work.target)
    if variant is not None and work.results is None and _writes_into(work.target, outputs[0]):
        return partial(variant.target, *args, **kwargs, **{variant.name: outputs[0]})
    return partial(_copy_results, partial(work.target, *args, **kwargs), work.results, outputs)


def _writes_into(target: OpOverload, out: Tensor) -> bool:
    """Whether the ``out`` variant of an operation can be trusted with memory of these strides."""
    return (
        out.is_contiguous()
        or torch.Tag.pointwise in target.tags
        or target.overloadpacket.__name__ in _WRITE_ANY_STRIDES
    )


def _copy_results(compute: Callable[[], Any], results: tuple[int, ...] | None, outputs: Sequence[Tensor]) -> None:
    with torch.no_grad():
        value = compute()
        values = [value] if results is None else [value[i] for i in results]
        for out, part in zip(outputs, values, strict=True):
            out.copy_(part)


class _OutVariant(NamedTuple):
    """The overload that writes into a given tensor, and the name of that argument."""

    target: OpOverload
    name: str


@lru_cache(maxsize=1024)
def _out_variant(target: OpOverload) -> _OutVariant | None:
    """The overload that takes the same arguments and a tensor to write into; None if there is none."""
    wanted = [(argument.name, str(argument.type)) for argument in target._schema.arguments]
    for name in target.overloadpacket.overloads():
        candidate = getattr(target.overloadpacket, name)
        arguments = candidate._schema.arguments
        written = [a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write]
        read = [(a.name, str(a.type)) for a in arguments if a.name not in written]
        if len(written) == 1 and read == wanted:
            return _OutVariant(candidate, written[0])
    return None
