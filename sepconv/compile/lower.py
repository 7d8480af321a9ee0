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
from sepconv.kernels import case
from sepconv.kernels.case import Case, Geometry, Outline
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
    if isinstance(target, Pool):
        return ""
    if isinstance(target, Separable):
        whole = _separable_case(target, args, out)
        return depthwise.slower(whole.first) if separable.slower(whole) else ""
    if target.kind == "grouped":
        return f"no kernel for grouped convolutions (groups={target.groups})"
    kernel = _KERNELS[target.kind]
    alone = _case(target, args, out)
    return kernel.supports(alone) or kernel.slower(alone)


_KERNELS: Any = {"normal": stem, "depthwise": depthwise, "pointwise": pointwise, "linear": pointwise}


def _outline(constant: Any) -> Any:
    """Of a weight, which need not be made again for it."""
    return None if constant is None else Outline.contiguous_of(constant.shape)


def _case(target: Convolution, args: Sequence[Tensor], out: Tensor) -> Case:
    """A convolution into given memory, as kernels know it."""
    residual = args[1] if target.residual else None
    weight, bias = _outline(target.weight), _outline(target.bias)
    geometry = Geometry(target.stride, target.padding, target.dilation)
    if target.kind == "depthwise":
        return case.depthwise(args[0], weight, bias, geometry, target.activation).into(out)
    if target.kind == "normal":
        return case.normal(args[0], weight, bias, residual, geometry, target.activation).into(out)
    return case.pointwise(args[0], weight, bias, residual, target.activation).into(out)


def _separable_case(target: Separable, args: Sequence[Tensor], out: Tensor) -> Case:
    first, second = target.depthwise, target.pointwise
    geometry, residual = Geometry(first.stride, first.padding, first.dilation), args[1] if target.residual else None
    dw = case.depthwise(args[0], _outline(first.weight), _outline(first.bias), geometry, first.activation)
    pw = case.pointwise(dw.y, _outline(second.weight), _outline(second.bias), residual, second.activation)
    return case.separable(dw, pw).into(out)


def _bind(target: Any, args: Sequence[Tensor], out: Tensor, store: Store, choice: str = "") -> Call:
    if isinstance(target, Pool):
        return Call(pool.bind(pool.plan(case.pool(args[0], out)), args[0], [], None, out), "halide")
    if isinstance(target, Separable):
        if choice == "split":
            return _bind_split(target, args, out, store, "depthwise and pointwise in turn were measured to be faster")
        whole = _separable_case(target, args, out)
        if apart := separable.slower(whole):
            return _bind_split(target, args, out, store, apart)
        first, second = target.depthwise, target.pointwise
        return _bind_kernel(separable, whole, (first.weight, second.weight, first.bias, second.bias), args, out, store)
    return _bind_convolution(target, args, out, store)


def _bind_convolution(target: Convolution, args: Sequence[Tensor], out: Tensor, store: Store) -> Call:
    constants = (target.weight, target.bias)
    return _bind_kernel(_KERNELS[target.kind], _case(target, args, out), constants, args, out, store)


def _bind_kernel(
    kernel: Any, known: Case, constants: Sequence[Any], args: Sequence[Tensor], out: Tensor, store: Store
) -> Call:
    found = kernel.plan(known)
    keys: tuple[Hashable, ...] = tuple(None if constant is None else constant.key for constant in constants)
    packed = store.keep(
        (kernel.__name__, found.variant, *keys),
        lambda: _Packed(kernel.pack(found, [None if constant is None else constant.tensor for constant in constants])),
    )
    residual = args[1] if len(args) > 1 else None
    return Call(kernel.bind(found, args[0], packed, residual, out), "halide", holds=packed)


def _bind_split(target: Separable, args: Sequence[Tensor], out: Tensor, store: Store, reason: str) -> Call:
    """Depthwise and pointwise in turn, the depthwise result in memory of its own."""
    shape = (out.shape[0], target.depthwise.out_channels, *out.shape[2:])
    hidden = torch.empty(shape, memory_format=torch.channels_last)
    first = _bind_convolution(target.depthwise, args[:1], hidden, store)
    second = _bind_convolution(target.pointwise, [hidden, *args[1:]], out, store)

    chain = Chain([first.run, second.run])  # type: ignore[list-item]
    return Call(chain, "halide", reason, (first, second, hidden))


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
