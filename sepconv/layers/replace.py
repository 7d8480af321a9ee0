"""Somebody's network with our layers in the place of its convolutions, and back: for training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from sepconv.layers.conv import DepthwiseConv2d, PointwiseConv2d
from sepconv.layers.separable import SeparableConv2d
from sepconv.layers.training import LayerNorm, NormalConv2d, finished

Filter = Callable[[nn.Module, str], bool]

_OURS = (DepthwiseConv2d, PointwiseConv2d, SeparableConv2d)
_STATE = "replaced"
"""The attribute of a replaced layer that says whether it was PyTorch's, and whether it waited before."""
_ALL_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_LAYER_NORMS = (nn.LayerNorm, LayerNorm)


@dataclass(frozen=True)
class Replacements:
    """What :func:`replace_layers` did.

    Attributes:
        model: the network.
        replaced: the names of the layers that are ours now, with the kind of each.
        left: the names of the convolutions and norms that stay as they are, with the reason of each.
    """

    model: nn.Module = field(repr=False)
    replaced: dict[str, str]
    left: dict[str, str]

    def undo(self) -> nn.Module:
        """The network as it was; see :func:`restore_layers`."""
        return restore_layers(self.model)

    def __str__(self) -> str:
        lines = [f"{name}: {kind}" for name, kind in self.replaced.items()]
        return "\n".join([*lines, *[f"{name}: left ({reason})" for name, reason in self.left.items()]])


def replace_layers(model: nn.Module, *, filter: Filter | None = None) -> Replacements:
    """Put our layers in the place of a network's 2d convolutions and LayerNorms, in place: it trains in fewer passes.

    Every one stays the module that it is, with its parameters, its name in the state_dict and its hooks; only
    its class changes. Norms, activations and the network's own code stay too: what they compute is the same, in other
    passes (see the guide on training). Optimizers made before go on, and copies and pickles of the network are like it.
    Kernels are for channels_last images: ``model.to(memory_format=torch.channels_last)``.

    Args:
        model: any network; it may have been replaced in part or as a whole before.
        filter: of a convolution or LayerNorm and its name, whether it may be replaced; all may where it is None.

    Returns:
        What was replaced, why the rest was left, and the way back: ``undo()``.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        >>> print(replace_layers(model))
        0: depthwise
        >>> type(restore_layers(model)[0]).__name__
        'Conv2d'
    """
    _check("replace_layers", model)
    replaced: dict[str, str] = {}
    left: dict[str, str] = {}
    for name, module in model.named_modules():
        if not isinstance(module, (_ConvNd, SeparableConv2d)) and not _is_of_rows(module):
            if isinstance(module, _ALL_NORMS) and not _is_known(module):
                left[name] = f"a {type(module).__name__} computes by itself"
            continue
        if filter is not None and not filter(module, name):
            left[name] = "the filter left it"
            continue
        kind, reason = _kind(module)
        if reason:
            left[name] = reason
        else:
            replaced[name] = kind
            _replace(module, kind)
    if replaced:
        _drop_hooks(model)  # between a part and the rest of a network nothing has to be finished
        model.register_forward_hook(finish_outputs)
    return Replacements(model, replaced, left)


def restore_layers(model: nn.Module) -> nn.Module:
    """Undo :func:`replace_layers`, in place, also on a copy or what was loaded from a pickle.

    Returns:
        The model.
    """
    _check("restore_layers", model)
    for module in model.modules():
        if _STATE in vars(module):
            _restore(module)
    _drop_hooks(model)
    return model


@contextmanager
def replaced_layers(model: nn.Module) -> Iterator[None]:
    """Inside the block the network has our layers; one that had them before keeps them."""
    before = any(_STATE in vars(module) for module in model.modules())
    if not before:
        replace_layers(model)
    try:
        yield
    finally:
        if not before:
            restore_layers(model)


def saves_passes(model: nn.Module) -> bool:
    """Whether norms and activations stand between a network's convolutions.

    In networks that ``convert`` wrote they stand behind a whole separable layer: measured, fused passes then take 0.93
    to 1.06 of the speed of PyTorch's in float32.
    """
    modules = list(model.modules())
    bare = [
        module for module in modules if isinstance(module, SeparableConv2d) and module.stages[0][1:] == (None, None)
    ]
    return 4 * len(bare) < sum(isinstance(module, _ConvNd) for module in modules)


def class_of(module: nn.Module) -> type[nn.Module]:
    """The class of a module where nothing was replaced."""
    was_pytorchs, _ = vars(module).get(_STATE, (False, False))
    return _pytorchs(module) if was_pytorchs else type(module)


def _pytorchs(module: nn.Module) -> type[nn.Module]:
    """What a replaced layer of PyTorch's was."""
    return nn.LayerNorm if isinstance(module, nn.LayerNorm) else nn.Conv2d


def finish_outputs(model: nn.Module, args: Any, result: Any) -> Any:
    """The hook at the end of a network: what leaves it are ordinary tensors."""
    return finished(result)


def _drop_hooks(model: nn.Module) -> None:
    for module in model.modules():
        for handle, hook in [*module._forward_hooks.items()]:
            if hook is finish_outputs:
                del module._forward_hooks[handle]


def _check(name: str, model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name}: model must be a torch.nn.Module, got {type(model).__name__}")


def _is_known(norm: nn.Module) -> bool:
    """Whether a norm calls ``F.batch_norm``, whose call is what we see: PyTorch's own and timm's do."""
    return isinstance(norm, _NORMS)


def _is_of_rows(module: nn.Module) -> bool:
    """Whether it is a LayerNorm over the last dimension alone."""
    return type(module) in _LAYER_NORMS and len(module.normalized_shape) == 1  # type: ignore[arg-type]


def _kind(module: nn.Module) -> tuple[str, str]:
    """The kind of a convolution, and why it cannot be ours ("" if it can)."""
    kind = type(module)
    if kind in _LAYER_NORMS:
        return "layer_norm", ""
    if kind in _OURS or kind is NormalConv2d:
        return kind.__name__.removesuffix("Conv2d").lower(), ""
    if kind is not nn.Conv2d:
        return "", f"a {kind.__name__} may do something else than nn.Conv2d"
    conv: Any = module
    if conv.padding_mode != "zeros":
        return "", f"padding_mode is {conv.padding_mode!r}"
    if conv.groups == conv.in_channels and conv.groups > 1:
        return "depthwise", ""
    padded = conv.padding not in ("same", "valid") and any(conv.padding)
    if conv.groups == 1 and set(conv.kernel_size) == {1} and not padded:
        return "pointwise", ""
    return "normal", ""


_CLASSES: dict[str, type[nn.Module]] = {
    "depthwise": DepthwiseConv2d,
    "pointwise": PointwiseConv2d,
    "normal": NormalConv2d,
    "layer_norm": LayerNorm,
}


def _replace(module: Any, kind: str) -> None:
    if _STATE not in vars(module):
        was_pytorchs = type(module) in (nn.Conv2d, nn.LayerNorm)
        setattr(module, _STATE, (was_pytorchs, not was_pytorchs and module.waits))
        if was_pytorchs:
            module.__class__ = _CLASSES[kind]
    module.waits = True
    vars(module).pop("asked", None)


def _restore(module: Any) -> None:
    was_pytorchs, waited = vars(module).pop(_STATE)
    vars(module).pop("asked", None)
    if was_pytorchs:
        del module.waits
        module.__class__ = _pytorchs(module)
    else:
        module.waits = waited
