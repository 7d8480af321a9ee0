"""In which modules of a network its operations are: for errors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from sepconv.compile.prepare import WrittenModel

UNKNOWN = "the model"
_MOST = 4


class _Watch(TorchDispatchMode):
    """The names of the modules that run while an operation does, by operation."""

    def __init__(self) -> None:
        super().__init__()
        self.running: list[str] = []
        self.found: dict[str, dict[str, None]] = {}

    def __torch_dispatch__(self, op: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        place = next(filter(None, reversed(self.running)), UNKNOWN)
        self.found.setdefault(_base(str(op)), {})[place] = None
        return op(*args, **(kwargs or {}))


def where(written: WrittenModel, operations: Iterable[str]) -> dict[str, str]:
    """The modules that call each of these operations, while the model runs on its example."""
    watch, hooks = _Watch(), []
    for name, module in written.model.named_modules():
        hooks += _watched(watch, name, module)
    try:
        with watch:
            written.again()
    finally:
        for hook in hooks:
            hook.remove()
    known = {operation: list(watch.found.get(_base(operation), {UNKNOWN: None})) for operation in operations}
    return {operation: _listed(places) for operation, places in known.items()}


def _watched(watch: _Watch, name: str, module: nn.Module) -> list[Any]:
    return [
        module.register_forward_pre_hook(lambda *_: watch.running.append(name)),
        module.register_forward_hook(lambda *_: watch.running.pop() and None, always_call=True),
    ]


def _base(operation: str) -> str:
    """Without the overload, and without the line of those that change their input."""
    return operation.split(".")[1].rstrip("_") if operation.startswith("aten.") else operation


def _listed(places: list[str]) -> str:
    more = f" and {len(places) - _MOST} others" if len(places) > _MOST else ""
    return ", ".join(places[:_MOST]) + more
