"""``sepconv.compile``: a trained network made fast, and the object that runs it."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree
from torch.utils._pytree import TreeSpec

from sepconv.compile.constants import is_constant
from sepconv.compile.copies import frozen_copy
from sepconv.compile.explain import NetworkExplanation, explain_network, explain_parts
from sepconv.compile.looks import is_channels_last
from sepconv.compile.mapped import let_go
from sepconv.compile.network import PreparedNetwork
from sepconv.compile.numbers import NumberType, not_computed
from sepconv.compile.parts import CompiledPart, put_in_place
from sepconv.compile.precision import FLOAT32, checked_precision
from sepconv.compile.prepare import EMPTY, How, WrittenModel, apart, as_captured, prepare
from sepconv.compile.store import Store
from sepconv.kernels.halide.jit.threads import alone
from sepconv.layers.borrowed import in_training, is_exported
from sepconv.system.threads import MOST as MOST_THREADS

MAX_SIZES = 16
_Key = tuple[Hashable, ...]

# The structure of the arguments of a call with one positional argument.
_SINGLE = pytree.tree_structure(((0,), {}))


def compile(
    model: nn.Module,
    example_input: Any,
    *,
    precision: str | None = None,
    threads: int | None = None,
    tune: bool = False,
) -> CompiledModel:
    """A fast version of a trained network for inference on CPUs, with the same results up to rounding.

    Batch norms are folded into the convolutions, and convolutions are computed together with their activations,
    residuals and, where depthwise and pointwise follow one another, with each other. Operations it does not know run
    through PyTorch. ``model`` stays as it is and its weights are copied: later changes to them have no effect.

    Args:
        model: in evaluation mode.
        example_input: a tensor, a tuple of positional arguments, or a dict of keyword arguments. Batch and image sizes
            may differ in later calls; each new size is prepared at its first call.
        precision: "float32", which None means too, or "bfloat16": what layers hand to one another is kept in 16 bits,
            weights too, and sums are in float32, as are inputs and outputs. Where the processor has no products of
            bfloat16, or a layer would gain nothing, it is computed in float32, and ``explain()`` says why.
        threads: number of threads to run with; None follows ``torch.set_num_threads``.
        tune: measure alternatives for each group on the example (fused or not, our kernel or PyTorch's) and keep the
            fastest.

    Raises:
        TypeError: ``model`` is no module, or ``precision`` no name.
        ValueError: the model is in training mode, or does not accept the example; ``precision`` is another.

    Example:
        >>> import sepconv
        >>> model = sepconv.models.MobileNetV1(0.25, num_classes=10).eval()
        >>> fast = sepconv.compile(model, torch.randn(1, 3, 64, 64))
        >>> fast(torch.randn(2, 3, 96, 96)).shape
        torch.Size([2, 10])
    """
    if threads is not None and (not isinstance(threads, int) or not 1 <= threads <= MOST_THREADS):
        raise ValueError(
            f"compile: threads must be None or a positive integer, got {threads!r} (the most are {MOST_THREADS})"
        )
    compiled = unprepared(model, threads, tune, checked_precision(precision))
    args, kwargs = arguments_of(example_input)
    with torch.inference_mode(False), torch.no_grad():
        compiled.prepare(*args, **kwargs)
    return compiled


def unprepared(
    model: nn.Module, threads: int | None = None, tune: bool = False, precision: str = FLOAT32
) -> CompiledModel:
    """What :func:`compile` returns, before it is prepared for inputs of any size."""
    # What torch.compile returned computes the same as what it was given.
    model = getattr(model, "_orig_mod", model)
    _check_model(model)
    _warn_of_hooks(model)
    with torch.inference_mode(False), torch.no_grad():
        reason = ""
        try:
            frozen = frozen_copy(model)
        except ValueError as error:
            frozen, reason = model, f"{str(error).removeprefix('compile: ')}; later changes to it count"
        return CompiledModel(frozen, threads, tune, precision=precision, reason=reason)


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"compile: model must be a torch.nn.Module, got {type(model).__name__}")
    training = in_training(model)
    if training is not None:
        first = "export it after model.eval()" if is_exported(model) else "call model.eval() first"
        raise ValueError(f"compile: {training or 'the model'} is in training mode; {first}")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise ValueError(f"compile: {name} has no size yet; call the model once before it is compiled")


def _warn_of_hooks(model: nn.Module) -> None:
    """PyTorch's own hooks, those of weight_norm and pruning, compute weights: they are part of what is captured."""
    for name, module in model.named_modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if any(not _home(hook).startswith("torch.") for hook in hooks):
            warnings.warn(
                f"compile: {name or 'the model'} has forward hooks: they run while a new input size is prepared, "
                "and not in later calls",
                stacklevel=4,
            )
            return


def _home(hook: object) -> str:
    return str(getattr(hook, "__module__", None) or type(hook).__module__)


def arguments_of(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example, dict):
        return (), example
    return (tuple(example) if isinstance(example, (tuple, list)) else (example,)), {}


class CompiledModel:
    """What :func:`compile` returns: call it like the model.

    It computes no gradients. Python threads may call it at the same time, and forked children of this process. A copy
    (``copy.deepcopy``) shares what never changes, which is everything but the list of prepared sizes. It cannot be
    pickled, since compiled code belongs to one process: pickle the model and compile it again.
    """

    def __init__(
        self,
        frozen: nn.Module,
        threads: int | None = None,
        tune: bool = False,
        *,
        precision: str = FLOAT32,
        same_channels: bool = True,
        what: str = "compile: the model",
        reason: str = "",
        part: int = 0,
    ) -> None:
        """
        Args:
            frozen: belongs to this object from now on.
            precision: one of ``PRECISIONS``.
            same_channels: an image's channels may not change.
            what: it is called in warnings.
            reason: why it runs through PyTorch, if that is known already.
            part: of another model if not 0, for so many sizes: it warns of nothing and has no parts of its own.
        """
        self._frozen, self._threads, self._tune, self._what = frozen, threads, tune, what
        self._precision = precision
        named = [*frozen.named_parameters(), *frozen.named_buffers()]
        self._store = Store(dict(named))
        self._reason = reason or _unsuitable([tensor for _, tensor in named])
        self._warned = bool(part)
        self._most_new = part
        self._parts: list[CompiledPart] = []
        self._same_channels = same_channels
        self._spec: TreeSpec | None = None
        self._single = False
        self._checked: list[tuple[torch.dtype, torch.device, tuple[int, ...]] | None] = []
        self._networks: OrderedDict[_Key, PreparedNetwork | str] = OrderedDict()
        self._last: _Key = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._single and len(args) == 1 and not kwargs and type(args[0]) is Tensor:
            leaves: Sequence[Any] = args
        else:
            leaves, spec = pytree.tree_flatten((args, kwargs))
            if spec != self._spec:
                raise ValueError(f"CompiledModel: compiled for arguments {_shown(self._spec)}, got {_shown(spec)}")
        if self._threads is None and not torch.is_autocast_enabled("cpu"):
            return self._run(leaves)
        # What was captured without autocast stays as it is: numbers of 32 bits.
        with _num_threads(self._threads), torch.autocast("cpu", enabled=False):
            return self._run(leaves)

    def _run(self, leaves: Sequence[Any]) -> Any:
        network = self._network(self._key(leaves), leaves)
        if isinstance(network, str):
            return self._eager(leaves)
        tensors = [as_captured(leaf) for leaf in leaves if isinstance(leaf, Tensor)]
        return network.restore(network.run(tensors))

    def prepare(self, *args: Any, **kwargs: Any) -> None:
        """Get ready for arguments of these sizes, as the first call with them would."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if self._spec is None:
            self._spec, self._single = spec, spec == _SINGLE and isinstance(leaves[0], Tensor)
            self._checked = [
                (leaf.dtype, leaf.device, tuple(leaf.shape)) if isinstance(leaf, Tensor) else None for leaf in leaves
            ]
        with _num_threads(self._threads):
            self._network(self._key(leaves), leaves)

    @property
    def precision(self) -> str:
        """What was asked for: "float32" or "bfloat16"."""
        return self._precision

    def write(self, *args: Any, **kwargs: Any) -> WrittenModel:
        """The program for arguments of these sizes, with kernels for the machine that they are made for.

        Raises:
            CaptureError: the model cannot be captured as a whole.
            ValueError: it does not accept these arguments, or has parameters that our kernels do not compute with.
        """
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if self._reason and not self._parts:
            raise ValueError(self._reason)
        return WrittenModel(self._frozen, leaves, spec, self._store, self._precision)

    def explain(self, *, measure: bool = False) -> NetworkExplanation:
        """What is computed how for the size used last: groups, kernels, multiply-adds and reasons of fallbacks.

        Args:
            measure: time every group as well (about 20 runs on random numbers).
        """
        network = self._networks[self._last]
        if isinstance(network, str):
            parts = [(part.name, part.compiled.explain(measure=measure)) for part in self._parts]
            return explain_parts(parts, network)
        return explain_network(network, measure)

    def _key(self, leaves: Sequence[Any]) -> _Key:
        parts: list[Hashable] = [torch.get_num_threads()]
        for leaf, checked in zip(leaves, self._checked, strict=True):
            if isinstance(leaf, Tensor):
                _check(leaf, checked, self._same_channels)
                parts += (leaf.shape, not leaf.is_contiguous() and is_channels_last(leaf))
            elif checked is not None:
                raise ValueError(f"CompiledModel: got {type(leaf).__name__} where the example has a tensor")
            elif is_constant(leaf):
                parts += (type(leaf), leaf)
            else:
                raise ValueError(f"CompiledModel: arguments must be tensors or constants, got {type(leaf).__name__}")
        return tuple(parts)

    def _network(self, key: _Key, leaves: Sequence[Any]) -> PreparedNetwork | str:
        network = self._networks.get(key)
        if network is not None:
            with suppress(KeyError):  # another thread may have dropped it meanwhile
                self._networks.move_to_end(key)
        else:
            assert self._spec is not None
            network = self._reason or self._prepared(leaves, self._spec)
            self._networks[key] = network
            let_go(self._frozen.parameters())
            if isinstance(network, str):
                self._warn(network)
            with suppress(KeyError):
                while len(self._networks) > MAX_SIZES:
                    self._networks.popitem(last=False)
        self._last = key
        return network

    def _prepared(self, leaves: Sequence[Any], spec: TreeSpec) -> PreparedNetwork | str:
        """For inputs of a new size; parts of the model if that is not possible for all of it."""
        if self._most_new and len(self._networks) >= self._most_new:
            return f"its inputs had {self._most_new} sizes before"
        network = prepare(self._frozen, leaves, spec, self._store, How(self._precision, self._tune))
        if isinstance(network, str) and network != EMPTY and not self._most_new:
            with apart(), suppress(Exception):  # the whole runs through PyTorch, whatever its modules do on trial
                self._parts = put_in_place(self._frozen, leaves, spec, self._as_part)
            # What holds the parts is not captured again for other sizes.
            self._reason = network if self._parts else ""
        return network

    def _as_part(self, module: nn.Module, sizes: int) -> CompiledModel:
        return CompiledModel(module, None, self._tune, precision=self._precision, same_channels=False, part=sizes)

    def _warn(self, reason: str) -> None:
        """Once; nothing is lost where there is nothing to compute."""
        if not self._warned and reason != EMPTY:
            self._warned = True
            how = f"in {len(self._parts)} parts and between them through PyTorch" if self._parts else "through PyTorch"
            warnings.warn(f"{self._what} runs {how}: {reason}", stacklevel=2)

    def _eager(self, leaves: Sequence[Any]) -> Any:
        assert self._spec is not None
        args, kwargs = pytree.tree_unflatten(list(leaves), self._spec)
        with torch.no_grad():
            return self._frozen(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledModel:
        return copy.copy(self)

    def __copy__(self) -> CompiledModel:
        other = CompiledModel.__new__(CompiledModel)
        other.__dict__.update(self.__dict__)
        other._networks = OrderedDict(self._networks)
        return other

    def __reduce__(self) -> Any:
        raise TypeError("CompiledModel: cannot be pickled; pickle the model and compile it again")


def _unsuitable(tensors: Sequence[Tensor]) -> str:
    """Why the kernels cannot compute a model with these parameters, "" if they can."""
    for tensor in tensors:
        if tensor.device.type != "cpu":
            return f"the kernels run on CPUs and the model is on {tensor.device}"
    numbers = [NumberType(tensor.dtype) for tensor in tensors if tensor.is_floating_point()]
    return not_computed(numbers, "the model has parameters of")


def _check(x: Tensor, checked: tuple[torch.dtype, torch.device, tuple[int, ...]] | None, same_channels: bool) -> None:
    if checked is None:
        raise ValueError("CompiledModel: got a tensor where the example has none")
    dtype, device, shape = checked
    if x.dtype is not dtype:
        raise ValueError(f"CompiledModel: compiled for {dtype}, got {x.dtype}; compile again for another dtype")
    if x.device != device:
        raise ValueError(f"CompiledModel: compiled for {device}, got a tensor on {x.device}")
    if x.dim() != len(shape):
        raise ValueError(f"CompiledModel: compiled for {len(shape)} dimensions {shape}, got {tuple(x.shape)}")
    if same_channels and len(shape) == 4 and x.shape[1] != shape[1]:
        raise ValueError(f"CompiledModel: compiled for {shape[1]} channels, got {x.shape[1]} in {tuple(x.shape)}")
    if 0 in x.shape[1:]:
        raise ValueError(f"CompiledModel: got an input without pixels, {tuple(x.shape)}")
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError("CompiledModel: computes no gradients; call it under torch.no_grad() or detach the input")


def _shown(spec: TreeSpec | None) -> str:
    assert spec is not None
    args, kwargs = spec.children()
    return f"({args.num_children} positional, keywords {list(kwargs.context)})"


@contextmanager
def _num_threads(threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if threads is None or threads == before or alone():
        yield
        return
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
