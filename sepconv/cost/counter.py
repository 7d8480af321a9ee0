"""The observer of a forward pass: a row for every operation that has multiply-adds or parameters.

Written here because PyTorch's ``FlopCounterMode`` knows sums a module: no rows with shapes, parameters and bytes, and
no name for weights that a function uses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from sepconv.activations import ACTIVATIONS
from sepconv.cost.result import Cost, Layer, Shape, closing_pair, with_separable_form
from sepconv.ops import schema as _operators  # noqa: F401  (registers the operations that RULES names)
from sepconv.ops.quantized import FAKE_QUANTIZE

_aten = torch.ops.aten
_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
_ACTIVATIONS = {
    *(operator for record in ACTIVATIONS.values() for operator in record.operators),
    *(_aten.hardtanh.default, _aten.hardsigmoid.default),
}
# What marks integers adds nothing up either.
_COPIES = {_aten.clone.default, _aten._to_copy.default, _aten.detach.default, FAKE_QUANTIZE}


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _without_batch(shape: Iterable[int]) -> Shape:
    sizes = tuple(shape)
    return sizes[1:] if sizes[:1] == (1,) else sizes


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The operation, or a shorter way to its shape: PyTorch's own for these takes most of the time of a count."""
    if args and isinstance(args[0], Tensor) and args[0].is_meta:
        if func in _ACTIVATIONS:
            return torch.empty_like(args[0])
        if func is _aten.native_batch_norm.default and not args[5]:
            nothing = args[0].new_empty(0)
            return torch.empty_like(args[0]), nothing, nothing
    return func(*args, **kwargs)


class Counter(TorchDispatchMode):
    """Collects the rows of one forward pass of ``model``, whose tensors gave way to their ``twins`` without data.

    ``computes``: the twins have data after all, and the pass computes with it.
    """

    def __init__(self, model: nn.Module, twins: dict[int, Tensor], computes: bool = False) -> None:
        super().__init__()
        self._model, self._twins, self._computes = model, twins, computes
        self._names = {id(module): name for name, module in model.named_modules()}
        self._owners = {id(p): name.rpartition(".")[0] for name, p in model.named_parameters()}
        self._uncounted = {id(p): p for p in model.parameters()}
        # The parameter that a tensor of the run is, or is a view or copy of; kept, so that no id is used twice.
        self._origins = {id(twins[id(p)]): p for p in model.parameters()}
        self._kept: list[Tensor] = []
        self._running: list[tuple[nn.Module, Shape]] = []
        self._conv_weights: dict[Any, int] = {}
        self._rows: list[Layer] = []
        self._depthwise: Layer | None = None

    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """A module starts."""
        if id(module) in self._names:
            first = _tensors(args)[:1]
            self._running.append((module, tuple(first[0].shape) if first else ()))

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """A module is done, and with it those inside whose exception it caught."""
        entered = [i for i, (running, _) in enumerate(self._running) if running is module]
        if entered:
            del self._running[entered[-1] :]

    def where(self) -> str:
        """The innermost module that runs, for an error message."""
        module, shape = self._running[-1] if self._running else (self._model, ())
        name = self._names[id(module)]
        layer = f"layer {name!r} ({type(module).__name__})" if name else type(module).__name__
        fails = "fails" if self._computes else "fails without data"
        return f"{layer} {fails}" + (f" on an input of shape {shape}" if shape else "")

    def result(self) -> Cost:
        """The sums, with the parameters that took no part as rows of their own."""
        for p in list(self._uncounted.values()):
            shape = tuple(p.shape)
            self._add(self._owners[id(p)], "unused", shape, shape, self._new_params(p), 0, 0)
        model = self._model
        for module in model.modules():
            weight = module._parameters.get("weight") if isinstance(module, _ConvNd) else None
            if weight is not None:
                self._conv_weights[id(weight)] = weight.numel()
        return Cost(
            params=sum(p.numel() for p in model.parameters()),
            buffers=sum(b.numel() for b in model.buffers() if b.is_floating_point()),
            conv_params=sum(self._conv_weights.values()),
            macs=sum(row.macs for row in self._rows),
            bytes=sum(row.bytes for row in self._rows),
            layers=self._rows,
        )

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = self._without_data(args, kwargs or {})
        if func not in RULES and func.has_kernel_for_dispatch_key(_COMPOSITE):
            # In inference mode PyTorch leaves it to us to take composite operations apart.
            with self:
                return func.decompose(*args, **kwargs)
        output = _run(func, args, kwargs)
        if func.is_view or func in _COPIES:
            self._follow(_tensors(args), _tensors(output))
        elif func in RULES:
            RULES[func](self, args, output)
        elif func.namespace == "sepconv":
            raise NotImplementedError(f"no rule for the operation {func}")
        else:
            self._parameters_only(func, _tensors((args, kwargs)), _tensors(output))
        return output

    def _without_data(self, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Where tensors with data, kept by modules outside their buffers, meet those without, drop the data."""
        tensors = _tensors((args, kwargs))
        if self._computes or not any(t.is_meta or id(t) in self._twins for t in tensors):
            return args, kwargs
        if kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": torch.device("meta")}
        return tree_map_only(Tensor, self._drop_data, (args, kwargs))

    def _drop_data(self, tensor: Tensor) -> Tensor:
        if tensor.is_meta:
            return tensor
        return self._twins[id(tensor)] if id(tensor) in self._twins else torch.empty_like(tensor, device="meta")

    def _follow(self, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        origin = self._origins.get(id(inputs[0])) if inputs else None
        if origin is not None:
            self._origins.update({id(t): origin for t in outputs})
            self._kept += outputs

    def is_parameter(self, tensor: Tensor) -> bool:
        return id(tensor) in self._origins

    def _new_params(self, *parameters: nn.Parameter) -> int:
        return sum(p.numel() for p in parameters if self._uncounted.pop(id(p), None) is not None)

    def _parameters_only(self, func: Any, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        """An operation without multiply-adds; it gets a row if parameters enter it for the first time."""
        mine = [t for t in inputs if self.is_parameter(t)]
        params = self._new_params(*(self._origins[id(t)] for t in mine))
        if params:
            source = next((t for t in inputs if not self.is_parameter(t)), mine[0])
            shapes = [_without_batch(t.shape) for t in (source, *outputs, source)[:2]]
            kind = "norm" if "norm" in func.name() else "other"
            self._add(self._name(mine[0]), kind, shapes[0], shapes[1], params, 0, 0)

    def _name(self, weight: Tensor) -> str:
        """The owner of the weight if it is the running module or lies in it, else the running module."""
        running = self._names[id(self._running[-1][0])] if self._running else ""
        origin = self._origins.get(id(weight))
        owner = running if origin is None else self._owners[id(origin)]
        return owner if not running or f"{owner}.".startswith(f"{running}.") else running

    def _add(
        self,
        name: str,
        kind: str,
        before: Shape,
        after: Shape,
        params: int,
        macs: int,
        moved: int,
        kernel_size: Shape = (),
        stride: Shape = (),
    ) -> None:
        row = Layer(name, kind, before, after, kernel_size, stride, params, macs, moved, params, macs)
        if kind == "normal":
            row = with_separable_form(row)
        opened = self._depthwise
        if kind == "pointwise" and opened is not None and opened.output_shape == before:
            row = closing_pair(opened, row)
            self._depthwise = None
        elif kind == "depthwise":
            self._depthwise = row
        self._rows.append(row)

    def product(self, kind: str, weight: Tensor, operands: Sequence[Tensor], output: Tensor, macs: int) -> None:
        """A matrix product; ``weight`` is the operand that is a parameter, if one is."""
        source = next(t for t in (*operands[-2:], *operands) if t is not weight or kind == "matmul")
        origins = [self._origins[id(t)] for t in operands if self.is_parameter(t)]
        moved = sum(t.numel() for t in (*operands, output)) * output.element_size()
        shapes = _without_batch(source.shape), _without_batch(output.shape)
        self._add(self._name(weight), kind, *shapes, self._new_params(*origins), macs, moved)

    def conv(
        self,
        kind: str,
        weight: Tensor,
        bias: Tensor | None,
        before: Shape,
        after: Shape,
        stride: Sequence[int],
    ) -> None:
        """A convolution between images of shape (N, C, ...) and (N, O, ...)."""
        used = [weight] if bias is None else [weight, bias]
        origins = [self._origins[id(t)] for t in used if self.is_parameter(t)]
        name, kernel_size = self._name(weight), tuple(weight.shape[2:])
        key = id(self._origins[id(weight)]) if self.is_parameter(weight) else (name, weight.shape)
        self._conv_weights[key] = weight.numel()
        # Each input pixel of a transposed convolution meets every tap, as each output pixel of the others does.
        macs = math.prod(before if kind == "transposed" else after) * weight[0].numel()
        moved = (math.prod(before) + math.prod(after) + sum(t.numel() for t in used)) * weight.element_size()
        shapes = _without_batch(before), _without_batch(after)
        self._add(name, kind, *shapes, self._new_params(*origins), macs, moved, kernel_size, tuple(stride))


def _convolution(counter: Counter, args: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, stride, _, _, transposed, _, groups = args
    if transposed:
        kind = "transposed"
    elif groups > 1:
        kind = "depthwise" if groups == x.shape[1] else "grouped"
    else:
        kind = "pointwise" if math.prod(weight.shape[2:]) == 1 else "normal"
    counter.conv(kind, weight, bias, tuple(x.shape), tuple(output.shape), stride)


def _depthwise_conv(counter: Counter, args: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, stride, *_ = args
    counter.conv("depthwise", weight, bias, tuple(x.shape), tuple(output.shape), stride)


def _pointwise_conv(counter: Counter, args: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, *_ = args
    counter.conv("pointwise", weight, bias, tuple(x.shape), tuple(output.shape), (1,) * (x.dim() - 2))


def _separable_conv(counter: Counter, args: tuple[Any, ...], output: Tensor) -> None:
    x, depthwise, pointwise, depthwise_bias, pointwise_bias, _, stride, *_ = args
    hidden = (x.shape[0], depthwise.shape[0], *output.shape[2:])
    counter.conv("depthwise", depthwise, depthwise_bias, tuple(x.shape), hidden, stride)
    counter.conv("pointwise", pointwise, pointwise_bias, hidden, tuple(output.shape), (1,) * len(stride))


def _matrix_product(counter: Counter, args: tuple[Any, ...], output: Tensor) -> None:
    """mm, bmm, mv, dot, and those with a term to add in front: (..., n, k) times (..., k, m)."""
    operands = _tensors(args)
    left, right = operands[-2:]
    macs = left.numel() * (right.shape[-1] if right.dim() > 1 else 1)
    weight = next((t for t in (right, left) if counter.is_parameter(t)), None)
    kind = "matmul" if weight is None else "linear"
    counter.product(kind, right if weight is None else weight, operands, output, macs)


Rule = Callable[[Counter, tuple[Any, ...], Tensor], None]

RULES: dict[Any, Rule] = {
    _aten.convolution.default: _convolution,
    torch.ops.sepconv.depthwise_conv.default: _depthwise_conv,
    torch.ops.sepconv.pointwise_conv.default: _pointwise_conv,
    torch.ops.sepconv.separable_conv.default: _separable_conv,
    **{
        getattr(_aten, name).default: _matrix_product
        for name in ("mm", "addmm", "bmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "vdot")
    },
}
