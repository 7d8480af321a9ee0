"""Somebody else's model while we work with it: evaluation mode inside a block, and copies. It is left as it was."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Inside the block the models are in evaluation mode; afterwards every module has its own mode back.

    The modes are set directly: a ``train()`` of the module's own may do more (merge weights, say) or refuse, as that of
    a model exported by ``torch.export`` does.

    Raises:
        ValueError: a model was exported in training mode, which it cannot leave.
    """
    for model in models:
        if _exported_in_training(model):
            raise ValueError(
                f"{type(model).__name__} was exported in training mode and stays in it: call eval() on the model, "
                "then torch.export.export"
            )
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def in_training(model: nn.Module) -> str | None:
    """The name of a module in training mode, "" for the model itself; None where there is none.

    An exported model has the mode that it was exported in, whatever its modules say.
    """
    if is_exported(model):
        return "" if _exported_in_training(model) else None
    return next((name for name, module in model.named_modules() if module.training), None)


def is_exported(model: nn.Module) -> bool:
    """Whether ``torch.export`` made this module; it has put an ``eval()`` in it that refuses."""
    return isinstance(model, fx.GraphModule) and "eval" in vars(model)


def _exported_in_training(model: nn.Module) -> bool:
    return is_exported(model) and any(_trains(node) for node in model.graph.nodes)  # type: ignore[union-attr]


def _trains(node: fx.Node) -> bool:
    """Whether an operation is told to do what it does in training: a batch norm, a dropout."""
    if not isinstance(node.target, OpOverload):
        return False
    names = [argument.name for argument in node.target._schema.arguments]
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    return any(given.get(name) is True for name in ("training", "train"))


def copied(model: nn.Module, caller: str, *, sharing: bool = False) -> Any:
    """A deep copy. Tensors that a module keeps beside its parameters are copied by value, whatever they were made from.

    That is what pruned modules and those with an old weight norm have in the place of a weight.

    Args:
        sharing: the copy has parameters of its own over the same memory: for one that is only run.

    Raises:
        ValueError: something in the model cannot be copied; the message names the module.
    """
    made = [leaf for module in model.modules() for leaf in tree_leaves(vars(module))]
    memo = {id(t): t.detach().clone() for t in made if isinstance(t, Tensor) and not t.is_leaf}
    if sharing:
        plain = (p for p in model.parameters() if type(p) is nn.Parameter and not p.is_inference())
        memo |= {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in plain}
    try:
        return copy.deepcopy(model, dict(memo))
    except Exception as error:  # any code may run in a copy
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{caller}: {_uncopied(model, memo)} cannot be copied ({reason})") from error


def _uncopied(model: nn.Module, memo: dict[int, Tensor]) -> str:
    """The module with an attribute that cannot be copied, in words."""
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            try:
                if key != "_modules":
                    copy.deepcopy(value, dict(memo))
            except Exception:
                return f"{key} of layer {name!r} ({type(module).__name__})" if name else f"{key} of the model"
    return f"the model ({type(model).__name__})"


def because_of_weights(model: nn.Module) -> str:
    """What to add where outputs are no numbers and the network's own weights are none; else ""."""
    for name, tensor in model.named_parameters():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            return f": so does its own {name}"
    # Buffers may hold infinity on purpose, as the masks of attention do.
    broken = (name for name, tensor in model.named_buffers() if tensor.is_floating_point() and tensor.isnan().any())
    return next((f": so does its own {name}" for name in broken), "")
