"""From a group to the call that computes it: a kernel bound to its memory, or PyTorch with the reason why."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sepconv.compile.capture import first_line
from sepconv.compile.constants import Store
from sepconv.compile.groups import Convolution, Pool, Separable
from sepconv.compile.layout import RESULTS
from sepconv.kernels.halide.conv import depthwise, pointwise, pool, separable, stem
from sepconv.kernels.halide.jit import runtime
from sepconv.kernels.halide.jit.buffers import Buffer
from sepconv.kernels.halide.jit.machine_code import Chain
from sepconv.kernels.halide.jit.runtime import BuildError


class Call(NamedTuple):
    """``run()`` computes the step. ``kernel`` is "halide" or "torch", ``reason`` says why not Halide.

    ``holds`` keeps packed weights alive for the next plan.
    """

    run: Callable[..., None]
    kernel: str
    reason: str = ""
    holds: Any = None


class _Packed(list[Any]):
    """Buffers over packed weights, shared between plans."""


def lower(target: Any, args: Any, kwargs: Any, outputs: Sequence[Tensor], store: Store, choice: str = "") -> Call:
    """The call that fills ``outputs``. ``target`` is as in ``layout.Step``, ``choice`` one of ``tune.alternatives``."""
    if target is None:
        return Call(partial(outputs[0].copy_, args[0]), "copy")
    if not isinstance(target, (Convolution, Separable, Pool)):
        return Call(_operation(target, args, kwargs, outputs), "torch", "no kernel for this operation")
    reason = runtime.missing() or runtime.unsuitable(outputs[0], *args) or _unfit(target, args, outputs[0])
    reason = reason or ("PyTorch was measured to be faster" if choice == "torch" else "")
    if not reason:
        try:
            return _bind(target, args, outputs[0], store, choice)
        except Exception as error:  # whatever goes wrong here is ours: the network runs all the same
            reason = str(error).splitlines()[0] if isinstance(error, BuildError) else first_line(error)
            warnings.warn(f"compile: a group runs through PyTorch: {reason}", stacklevel=2)
    return Call(partial(_through_torch, target, args, outputs[0]), "torch", reason, _weights(target))


def lower_direct(target: Convolution, x: Tensor, out: Tensor, store: Store, choice: str = "") -> Call:
    """The same for the first step of a network; ``run(x)`` takes any tensor with the sizes and strides of ``x``."""
    call = lower(target, [x], {}, [out], store, choice)
    if call.kernel == "torch":
        return call._replace(run=lambda given: _through_torch(target, [given], out))
    bound: Any = call.run
    image = next(argument for argument in bound.prepared.given if isinstance(argument, Buffer))

    def run(given: Tensor) -> None:
        image.move(given.data_ptr())
        bound()

    return call._replace(run=run)


def _weights(target: Any) -> list[Tensor]:
    """What PyTorch reads in every call, so that it need not be made again."""
    parts = (target.depthwise, target.pointwise) if isinstance(target, Separable) else (target,)
    return [c.tensor for part in parts if isinstance(part, Convolution) for c in (part.weight, part.bias) if c]


def _through_torch(target: Any, args: Sequence[Tensor], out: Tensor) -> None:
    with torch.no_grad():
        out.copy_(target(*args))


def _unfit(target: Any, args: Sequence[Tensor], out: Tensor) -> str:
    """Why none of the kernels can compute a group, in a sentence; "" if one can."""
    if out.numel() == 0:
        return "the result is empty"
    x = args[0]
    if isinstance(target, Pool):
        return ""
    if isinstance(target, Separable):
        return _slower_depthwise(target.depthwise, x) if separable.slower(target.depthwise.kernel_size) else ""
    if target.kind == "depthwise":
        return _slower_depthwise(target, x)
    if target.kind == "grouped":
        return f"no kernel for grouped convolutions (groups={target.groups})"
    if target.kind == "normal":
        if target.residual or target.groups > 1 or set(target.dilation) != {1}:
            return "the kernel for normal convolutions has no dilation, groups and residual"
        bias = None if target.bias is None else target.bias.tensor
        return stem.supports(x, target.weight.tensor, bias, target.activation, target.stride, target.padding)
    if target.kind == "pointwise" and x.dim() == 4 and x.shape[1] == 1 and out.shape[1] > 1:
        return "with one input channel both layouts look the same to the kernel"
    return ""


def _slower_depthwise(target: Convolution, x: Tensor) -> str:
    geometry = (target.stride, target.padding, target.dilation)
    return depthwise.slower("forward", x, target.weight.tensor, *geometry, target.activation, bound=True)


def _bind(target: Any, args: Sequence[Tensor], out: Tensor, store: Store, choice: str = "") -> Call:
    if isinstance(target, Pool):
        return Call(pool.bind(args[0], out), "halide")
    if isinstance(target, Separable):
        if choice == "split":
            return _bind_split(target, args, out, store, "depthwise and pointwise in turn were measured to be faster")
        apart = separable.slower(target.depthwise.kernel_size)
        return _bind_split(target, args, out, store, apart) if apart else _bind_separable(target, args, out, store)
    binders = {"normal": _bind_conv, "depthwise": _bind_depthwise, "pointwise": _bind_matrix, "linear": _bind_matrix}
    return binders[target.kind](target, args, out, store)


def _tensor(constant: Any) -> Any:
    return None if constant is None else constant.tensor


def _keys(*constants: Any) -> tuple[Hashable, ...]:
    return tuple(None if constant is None else constant.key for constant in constants)


def _bind_separable(target: Separable, args: Sequence[Tensor], out: Tensor, store: Store) -> Call:
    first, second = target.depthwise, target.pointwise
    x, residual = args[0], args[1] if target.residual else None
    parts = (first.weight, first.bias, second.weight, second.bias)
    found = separable.plan(
        x.shape, first.weight.shape, second.out_channels, first.stride, first.padding, first.dilation,
        (first.activation, second.activation), residual is not None, torch.get_num_threads(),
    )  # fmt: skip
    packed = store.keep(
        ("separable", found.spec.multiplier, *found.spec.tile.panels, *_keys(*parts)),
        lambda: _Packed(separable.pack(found, *map(_tensor, parts))),
    )
    return Call(separable.bind(found, x, packed, residual, out), "halide", holds=packed)


def _bind_split(target: Separable, args: Sequence[Tensor], out: Tensor, store: Store, reason: str) -> Call:
    """Depthwise and pointwise in turn, the depthwise result in memory of its own."""
    shape = (out.shape[0], target.depthwise.out_channels, *out.shape[2:])
    hidden = torch.empty(shape, memory_format=torch.channels_last)
    first = _bind_depthwise(target.depthwise, args[:1], hidden, store)
    second = _bind_matrix(target.pointwise, [hidden, *args[1:]], out, store)

    chain = Chain([first.run, second.run])  # type: ignore[list-item]
    return Call(chain, "halide", reason, (first, second, hidden))


def _bind_conv(target: Convolution, args: Sequence[Tensor], out: Tensor, store: Store) -> Call:
    weight, bias = target.weight.tensor, _tensor(target.bias)
    found = stem.plan_for(args[0], weight, target.activation, target.stride, target.padding)
    packed = store.keep(
        ("conv", *found.spec.tile.panels, *_keys(target.weight, target.bias)),
        lambda: _Packed(stem.pack(found, weight, bias)),
    )
    return Call(stem.bind(found, args[0], packed, out), "halide", holds=packed)


def _bind_depthwise(target: Convolution, args: Sequence[Tensor], out: Tensor, store: Store) -> Call:
    weight, bias = target.weight.tensor, _tensor(target.bias)
    geometry = (target.stride, target.padding, target.dilation)
    return Call(depthwise.bind(args[0], weight, bias, *geometry, target.activation, out), "halide")


def _bind_matrix(target: Convolution, args: Sequence[Tensor], out: Tensor, store: Store) -> Call:
    x, residual = args[0], args[1] if target.residual else None
    weight, bias = target.weight.tensor, _tensor(target.bias)
    found = pointwise.plan(x, target.out_channels, target.activation, residual is not None)
    packed = store.keep(
        ("matrix", *found.panels, *_keys(target.weight, target.bias)),
        lambda: _Packed(pointwise.pack(found, weight, bias)),
    )
    return Call(pointwise.bind(found, x, packed, residual, out), "halide", holds=packed)


def _operation(target: Any, args: Any, kwargs: Any, outputs: Sequence[Tensor]) -> Callable[[], None]:
    """An ATen operation into memory that is already there, by its ``out`` variant or by a copy."""
    variant = _out_variant(target)
    if variant is not None and len(outputs) == 1 and RESULTS not in kwargs and _writes_into(target, outputs[0]):
        operation, name = variant
        return partial(operation, *args, **kwargs, **{name: outputs[0]})
    return partial(_copy_results, target, args, kwargs, outputs)


# Beside operations number by number: these write what they should into an output of any strides. That of softmax and
# of tril do not (PyTorch 2.13).
_WRITE_ANY_STRIDES = (
    "cat", "mean", "sum", "amax", "amin", "mm", "addmm", "bmm", "baddbmm", "avg_pool2d", "adaptive_avg_pool2d",
    "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d", "reflection_pad2d", "replication_pad2d", "glu",
    "index_select",
)  # fmt: skip


def _writes_into(target: Any, out: Tensor) -> bool:
    """Whether the ``out`` variant of an operation can be trusted with memory of these strides."""
    return (
        out.is_contiguous()
        or torch.Tag.pointwise in target.tags
        or target.overloadpacket.__name__ in _WRITE_ANY_STRIDES
    )


def _copy_results(target: Any, args: Any, kwargs: Any, outputs: Sequence[Tensor]) -> None:
    given = {name: value for name, value in kwargs.items() if name != RESULTS}
    with torch.no_grad():
        value = target(*args, **given)
        values = [value[i] for i in kwargs[RESULTS]] if RESULTS in kwargs else [value]
        for out, part in zip(outputs, values, strict=True):
            out.copy_(part)


@lru_cache(maxsize=1024)
def _out_variant(target: Any) -> tuple[Any, str] | None:
    """The overload that writes into a given tensor and takes the same arguments, and the name of that argument."""
    packet = getattr(target, "overloadpacket", None)
    if packet is None:
        return None
    wanted = [(argument.name, str(argument.type)) for argument in target._schema.arguments]
    for name in packet.overloads():
        candidate = getattr(packet, name)
        arguments = candidate._schema.arguments
        written = [a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write]
        read = [(a.name, str(a.type)) for a in arguments if a.name not in written]
        if len(written) == 1 and read == wanted:
            return candidate, written[0]
    return None
