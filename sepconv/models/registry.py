"""Models by name: built-in ones, timm's, and the user's own."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable
from functools import partial
from reprlib import repr as shortened
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from sepconv.leaves.complaint import complaint
from sepconv.models.mobilenet_v1 import MobileNetV1, MobileNetV1Normal
from sepconv.models.mobilenet_v2 import MobileNetV2
from sepconv.models.quick import ResNetQuick, VGGQuick
from sepconv.models.resnet import ResNet
from sepconv.models.vgg import VGGSmall

BUILT_IN: dict[str, Callable[..., nn.Module]] = {
    "mobilenet_v1": MobileNetV1,
    "mobilenet_v1_normal": MobileNetV1Normal,
    "mobilenet_v2": MobileNetV2,
    "vgg_small": VGGSmall,
    "vgg_quick": VGGQuick,
    "resnet_quick": ResNetQuick,
    **{f"resnet{depth}": partial(ResNet, depth) for depth in (20, 32, 44, 56, 110)},
}


def create(name: str, /, **settings: Any) -> nn.Module:
    """Build a model by name.

    Args:
        name: one of ``BUILT_IN``, ``timm/NAME`` or ``torchvision/NAME`` (these packages must be installed), or
            ``package.module:function`` for any function or class that returns a module.
        settings: its arguments, such as ``width_mult=0.5``; ``pretrained=True`` has timm and torchvision load the
            weights that they recommend.

    Raises:
        ValueError: unknown name (the nearest ones are named), unknown or unfit setting (the known ones are named), a
            module that cannot be imported, lazy layers that have not seen an input.
        TypeError: the function returned something else than a module.

    Example:
        >>> type(create("mobilenet_v1", width_mult=0.25, num_classes=10)).__name__
        'MobileNetV1'
    """
    if name in BUILT_IN:
        return _build(name, BUILT_IN[name], settings)
    if name.startswith("timm/"):
        return _create_timm(name, settings)
    if name.startswith("torchvision/"):
        return _create_torchvision(name, settings)
    if ":" in name:
        return _build(name, _find(name), settings)
    nearest = _nearest(name, BUILT_IN)
    raise ValueError(
        f"create: unknown model {name!r}{nearest}; known are {', '.join(BUILT_IN)}, and the forms timm/NAME, "
        "torchvision/NAME and package.module:function"
    )


def _nearest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, known)
    return f" (did you mean {' or '.join(close)}?)" if close else ""


def _build(name: str, factory: Callable[..., Any], settings: dict[str, Any]) -> nn.Module:
    parameters = inspect.signature(factory).parameters.values()
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        allowed = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        for setting in settings:
            if setting not in allowed:
                listed = ", ".join(allowed) or "none"
                nearest = _nearest(setting, allowed)
                raise ValueError(f"create: {name} has no setting {setting!r}{nearest}; its settings are {listed}")
        needed = [p.name for p in parameters if p.name in allowed and p.default is p.empty]
        absent = [setting for setting in needed if setting not in settings]
        if absent:
            raise ValueError(f"create: {name} needs the settings {', '.join(absent)}")
    try:
        model = factory(**settings)
    except (ValueError, OSError):  # in the words of whoever wrote the model
        raise
    except (Exception, SystemExit) as error:
        raise ValueError(f"create: {name} cannot be built with {shortened(settings)} ({complaint(error)})") from error
    if not isinstance(model, nn.Module):
        raise TypeError(f"create: {name} must return a torch.nn.Module, got {type(model).__name__}")
    lazy = next((key for key, value in model.state_dict(keep_vars=True).items() if is_lazy(value)), None)
    if lazy is not None:
        raise ValueError(f"create: {lazy} of {name} has no shape yet: let the function run the model once before")
    return model


def function_of(name: str) -> Callable[..., Any]:
    """The user's own function of the name ``package.module:function``.

    Raises:
        ValueError: the name has another form, the module cannot be imported, or has no such function.
    """
    if not all(name.partition(":")):
        raise ValueError(f"create: a function is named package.module:function, got {name!r}")
    return _find(name)


def _find(name: str) -> Callable[..., Any]:
    """The object behind ``package.module:function``; importing runs the user's code, which may fail in any way."""
    module_name, _, attribute = name.partition(":")
    try:
        found = _imported(module_name)
    except (Exception, SystemExit) as error:  # a script may begin its work, or end it
        raise ValueError(
            f"create: cannot import {module_name!r} of {name!r} ({type(error).__name__}: {error})"
        ) from error
    function = getattr(found, attribute, None)
    if not callable(function):
        what = "is not callable" if hasattr(found, attribute) else "does not exist"
        public = [key for key, value in vars(found).items() if callable(value) and not key.startswith("_")]
        raise ValueError(f"create: {attribute!r} {what} in {module_name}{_nearest(attribute, public)}")
    return function


def _imported(name: str) -> Any:
    """A module, which may lie in the current folder: an installed command does not look there, as Python itself does.

    That folder comes last, so that nothing in it takes the place of what is installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        here = os.getcwd()  # noqa: PTH109  (sys.path holds text)
        if error.name != name.partition(".")[0] or {"", here} & set(sys.path):
            raise
        sys.path.append(here)
        importlib.invalidate_caches()
        return importlib.import_module(name)


def library_of(name: str) -> Any:
    """The package that ``timm/NAME`` or ``torchvision/NAME`` is of.

    Raises:
        ValueError: it cannot be imported.
    """
    package = name.partition("/")[0]
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(f"create: {name} needs the package {package} (pip install {package}): {error}") from error


def _create_timm(name: str, settings: dict[str, Any]) -> nn.Module:
    timm = library_of(name)
    short = name.removeprefix("timm/")
    architecture = short.partition(".")[0]
    known = timm.list_models()
    if architecture not in known:
        raise ValueError(f"create: timm has no model {architecture!r}{_nearest(architecture, known)}")
    try:
        return timm.create_model(short, **settings)
    except OSError as error:
        raise OSError(f"create: the weights of {name} cannot be had ({complaint(error)})") from error
    except Exception as error:
        raise ValueError(f"create: timm cannot build {short} with {settings}: {complaint(error)}") from error


def _takes(function: Callable[..., Any], name: str) -> bool:
    return name in inspect.signature(function).parameters


def _create_torchvision(name: str, settings: dict[str, Any]) -> nn.Module:
    models = library_of(name).models
    short, known = name.removeprefix("torchvision/"), models.list_models()
    if short not in known:
        raise ValueError(f"create: torchvision has no model {short!r}{_nearest(short, known)}")
    # Detection and segmentation have weights of their backbone downloaded unless told not to.
    backbone = {"weights_backbone": None} if _takes(models.get_model_builder(short), "weights_backbone") else {}
    given = {**backbone, **settings}
    weights = "DEFAULT" if given.pop("pretrained", False) else None
    try:
        return models.get_model(short, weights=weights, **given)
    except OSError as error:
        raise OSError(f"create: the weights of {name} cannot be had ({complaint(error)})") from error
    except Exception as error:
        raise ValueError(f"create: torchvision cannot build {short} with {settings}: {complaint(error)}") from error
