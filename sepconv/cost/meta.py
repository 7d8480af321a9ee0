"""Counting without computing: the network runs once on tensors without data (the "meta" device)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from numbers import Integral

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.parameter import is_lazy

from sepconv.cost.counter import Counter
from sepconv.cost.result import Cost
from sepconv.leaves import Inputs


def count(model: nn.Module, input_shape: Sequence[int] | Inputs) -> Cost:
    """Parameters, multiply-adds and bytes of a network for one input, without computing anything.

    Every operation that reaches PyTorch's dispatcher is seen, whoever calls it: a module, a function, a fused
    operation of this library. What is counted, per image:

    - multiply-adds of convolutions (transposed ones too), linear layers and matrix products. Taps that fall on
      padding count, as in the formulas of the literature; normalisation, activations, pooling and additions do not.
    - every parameter once, however often it is used and however many names it has.
    - bytes: weights, input and output of each operation that has multiply-adds, each read or written once. A fused
      operation moves less: its parts are counted as if each ran alone.

    The network runs in evaluation mode with batch 1 and the dtype of its first parameter. Afterwards it is what it was:
    weights, buffers, training flags, hooks and all other attributes of its modules. Hooks that the caller registered
    do run.

    Args:
        model: any module.
        input_shape: shape of the only input without the batch, such as (3, 224, 224); or an example of all inputs as
            ``sepconv.leaves.Inputs``, of which one sample is counted, and computed where the model's code needs values.

    Raises:
        TypeError: ``model`` is no module, or a TorchScript one.
        ValueError: ``input_shape`` is no shape, or the forward fails on it or needs values; the message names the
            layer.

    Example:
        >>> cost = count(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)), (3, 10, 10))
        >>> cost.conv_params, cost.macs
        (248, 15872)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"count: model must be a torch.nn.Module, got {type(model).__name__}")
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise TypeError("count: a TorchScript module cannot be observed; count the module it was made from")
    model = getattr(model, "_orig_mod", model)  # what torch.compile was given
    is_shape = isinstance(input_shape, Sequence) and all(map(_is_size, input_shape))
    if not is_shape and not isinstance(input_shape, Inputs):
        raise ValueError(f"count: input_shape must be positive integers without the batch, got {input_shape!r}")
    for name, tensor in _tensors(model):
        if is_lazy(tensor):
            raise ValueError(f"count: {name!r} of a lazy layer has no shape yet; run the model once before counting")
    if not isinstance(input_shape, Inputs):
        dtypes = (p.dtype for p in model.parameters() if p.is_floating_point())
        dtype = next(dtypes, torch.get_default_dtype())
        shape = f"{tuple(input_shape)}, to be given without the batch"
        return _counted(model, Inputs((torch.empty((1, *map(int, input_shape)), dtype=dtype, device="meta"),)), shape)
    sample = input_shape[:1]
    try:
        return _counted(model, sample.map(partial(torch.empty_like, device="meta")), str(sample))
    except ValueError:  # the model's own code may look at values: then it computes with the example's
        return _counted(model, sample.clone(), str(sample), computes=True)


def _counted(model: nn.Module, given: Inputs, shape: str, computes: bool = False) -> Cost:
    """
    Args:
        shape: in words, for messages.
        computes: the inputs have values, and the model its own.
    """
    make = _spare if computes else _twin
    twins = {id(tensor): make(tensor) for _, tensor in _tensors(model)}
    counter = Counter(model, twins, computes)
    with _undisturbed(model, twins), _watched(counter):
        try:
            with torch.inference_mode(False), torch.no_grad(), torch.compiler.set_stance("force_eager"), counter:
                model(*given.args, **given.kwargs)
        except Exception as error:
            raise ValueError(f"count: {counter.where()}: {_summary(error)} (input_shape = {shape})") from error
    return counter.result()


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _spare(tensor: Tensor) -> Tensor:
    """A parameter itself; of a buffer, which a call may change, a copy."""
    return tensor if isinstance(tensor, nn.Parameter) else tensor.clone()


def _is_size(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) > 0


def _summary(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _twin(tensor: Tensor) -> Tensor:
    """The same tensor without data."""
    twin = torch.empty_like(tensor, device="meta")
    return nn.Parameter(twin, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else twin


@contextmanager
def _undisturbed(model: nn.Module, twins: dict[int, Tensor]) -> Iterator[None]:
    """Twins in the place of parameters and buffers, evaluation mode; at the end everything as before.

    Modules may store anything in themselves while they run, such as a table for the last image size: all of it is
    restored.
    """
    tables = ("_parameters", "_buffers", "_modules")
    saved = [
        (vars(module), dict(vars(module)), {table: dict(vars(module)[table]) for table in tables})
        for module in model.modules()
    ]
    try:
        for attributes, _, _ in saved:
            attributes["training"] = False
            for table in ("_parameters", "_buffers"):
                attributes[table].update({k: twins[id(t)] for k, t in attributes[table].items() if t is not None})
        yield
    finally:
        for attributes, before, contents in saved:
            attributes.clear()
            attributes.update(before)
            for table, content in contents.items():
                attributes[table].clear()
                attributes[table].update(content)


@contextmanager
def _watched(counter: Counter) -> Iterator[None]:
    """Tell the counter which module runs, by PyTorch's global hooks: a hook on a module may change what it computes."""
    entering = register_module_forward_pre_hook(counter.enter)
    leaving = register_module_forward_hook(counter.leave)
    try:
        yield
    finally:
        entering.remove()
        leaving.remove()
