"""Weights from files: safetensors, or tensors in .pt and .pth; in our names, torchvision's or Hugging Face's."""

from __future__ import annotations

import errno
import os
import re
import stat
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from sepconv.models.mobilenet_v1 import MobileNetV1
from sepconv.system.files import name_for_libraries

# How files of torch.save begin: a zip archive, or the pickle opcode PROTO.
_PICKLES = (b"PK\x03\x04", b"\x80")
# Where checkpoints keep the state_dict; the average of the weights is what their authors evaluate.
_NESTED = ("state_dict_ema", "model_ema", "params_ema", "state_dict", "model_state_dict", "model", "net", "params")
_COMPILED = "_orig_mod."
_AVERAGES = "n_averaged"
"""A counter that PyTorch's ``AveragedModel`` keeps beside the weights."""
_SHOWN = 3

Value = TypeVar("Value")

_HUGGINGFACE_PARTS = {"convolution": "", "normalization": "_norm"}


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Read a safetensors file, or a state_dict that ``torch.save`` wrote, into ``model``: all of it or nothing.

    Of a checkpoint with more in it the state_dict is taken (under "state_dict", "model", ...). Names may begin with
    what was around the network: ``module.`` of ``DataParallel``, ``_orig_mod.`` of ``torch.compile``, ``model.`` of a
    class that trains it. A pickle is read by ``torch.load(weights_only=True)``, which runs no code.

    Names may be ours, torchvision's for :class:`MobileNetV2` (the same) and those of Hugging Face's
    ``MobileNetV1Model`` and ``MobileNetV1ForImageClassification`` for :class:`MobileNetV1`, which is then best built
    with ``tf_padding=True``.

    Raises:
        ValueError: the file is missing, damaged, needs code to be run, or holds weights of another architecture; the
            message names the first keys that differ. ``model`` is unchanged.

    Example:
        >>> import tempfile, safetensors.torch
        >>> model = nn.Linear(2, 1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     safetensors.torch.save_file(model.state_dict(), f"{folder}/weights.safetensors")
        ...     load_weights(model, f"{folder}/weights.safetensors")
    """
    path = Path(path)
    given = _unwrapped(_read(path), model)
    if _is_huggingface(model, given):
        given = from_huggingface(given)
        if not model.tf_padding:
            warnings.warn(
                f"load_weights: {path} has Hugging Face's names; weights trained with TensorFlow's padding, as all "
                "published ones, need MobileNetV1(tf_padding=True)",
                stacklevel=2,
            )
    _refuse_differences(model, {key: tensor.shape for key, tensor in given.items()}, path)
    model.load_state_dict(given, strict=False)


def check_fit(model: nn.Module, given: Mapping[str, torch.Size], path: Path) -> None:
    """ValueError unless ``load_weights`` would take tensors of these shapes; the model needs no data."""
    _refuse_differences(model, from_huggingface(given) if _is_huggingface(model, given) else given, path)


def shapes(path: Path) -> dict[str, torch.Size]:
    """The shape of every tensor in a safetensors file, from its header alone."""
    with name_for_libraries(path) as name, safe_open(name, framework="pt") as file:
        return {key: torch.Size(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118


def check_file(name: str, path: Path) -> None:
    """ValueError unless `path` is a file that can be opened and read more than once: no folder, device or pipe.

    Opening a pipe would wait for whoever writes to it.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        mode = path.stat().st_mode
    except OSError as error:
        raise ValueError(f"{name}: cannot read {path}: {error.strerror}") from error
    if not stat.S_ISREG(mode):
        raise ValueError(f"{name}: cannot read {path}: it is no regular file")


def _is_huggingface(model: nn.Module, given: Mapping[str, Any]) -> bool:
    return isinstance(model, MobileNetV1) and any(".convolution." in key for key in given)


def _refuse_differences(model: nn.Module, given: Mapping[str, torch.Size], path: Path) -> None:
    differences = _differences(model, given)
    if differences:
        raise ValueError(f"load_weights: {path} does not fit {type(model).__name__}: {'; '.join(differences)}")


def _read(path: Path) -> dict[str, Tensor]:
    check_file("load_weights", path)
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise ValueError(f"load_weights: cannot read {path}: {error.strerror}") from error
    try:
        with name_for_libraries(path) as name:
            return load_file(name)
    except SafetensorError as error:
        # Only now: one safetensors file in 32 begins with the byte of a pickle, as the length of its header.
        if start.startswith(_PICKLES):
            return _read_checkpoint(path)
        raise ValueError(f"load_weights: {path} is truncated or no safetensors file ({error})") from error


def _read_checkpoint(path: Path) -> dict[str, Tensor]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds, whatever the bytes are
        raise ValueError(
            f"load_weights: {path} is damaged or needs more than tensors and plain values, whose reading would run "
            "code; save the weights alone: torch.save(model.state_dict(), 'weights.pt')"
        ) from error
    # Beside the state_dict there may be tensors, such as the best accuracy so far.
    while isinstance(found, Mapping):
        name = next((name for name in _NESTED if isinstance(found.get(name), Mapping)), None)
        if name is None:
            break
        found = found[name]
    tensors = found if isinstance(found, Mapping) else {}
    tensors = {str(key): value for key, value in tensors.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"load_weights: {path} holds no state_dict, alone or under one of {', '.join(_NESTED)}")
    return tensors


def _unwrapped(given: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The tensors by their names in the model, without what was around it when they were saved; else as they are."""
    own = model.state_dict(keep_vars=True).keys()
    found = {
        key if key in own else key.replace(_COMPILED, ""): tensor
        for key, tensor in given.items()
        if key in own or key != _AVERAGES
    }
    while found and not own & found.keys():
        prefix = next(iter(found)).partition(".")[0] + "."
        if not all(key.startswith(prefix) for key in found):
            return given
        found = {key.removeprefix(prefix): tensor for key, tensor in found.items()}
    return found


def from_huggingface(state_dict: Mapping[str, Value]) -> dict[str, Value]:
    """The state_dict of Hugging Face's ``MobileNetV1Model`` or ``...ForImageClassification`` in the names of ours.

    ``layer.0`` to ``layer.25`` are the depthwise and pointwise layers of the 13 blocks in turn. Those networks pad as
    TensorFlow does: build ``MobileNetV1(num_classes=1001, tf_padding=True)`` for the published ones.

    Raises:
        ValueError: a key that no MobileNet v1 of Hugging Face has.

    Example:
        >>> list(from_huggingface({"mobilenet_v1.layer.3.normalization.bias": None}))
        ['blocks.1.pointwise_norm.bias']
    """
    return {_from_huggingface(key): tensor for key, tensor in state_dict.items()}


def _from_huggingface(key: str) -> str:
    short = key.removeprefix("mobilenet_v1.")
    if match := re.fullmatch(r"classifier\.(weight|bias)", short):
        return f"classifier.1.{match[1]}"
    match = re.fullmatch(r"(conv_stem|layer\.(\d+))\.(convolution|normalization)\.(\w+)", short)
    if match is None:
        raise ValueError(f"from_huggingface: {key!r} is no key of a MobileNet v1 of Hugging Face")
    _, layer, part, name = match.groups()
    if layer is None:
        return f"stem.{0 if part == 'convolution' else 1}.{name}"
    kind = "pointwise" if int(layer) % 2 else "depthwise"
    return f"blocks.{int(layer) // 2}.{kind}{_HUGGINGFACE_PARTS[part]}.{name}"


def _differences(model: nn.Module, given: Mapping[str, torch.Size]) -> list[str]:
    """What keeps the weights from fitting, one sentence per kind of difference."""
    own = model.state_dict(keep_vars=True)
    # A tensor that the model has under two names is stored under one; the counters of batch norms may be absent.
    present = {id(own[key]) for key in given if key in own}
    missing = [key for key in own if key not in given and id(own[key]) not in present and not _is_counter(key)]
    unknown = sorted(key for key in given if key not in own and not _is_counter(key))
    shapes = [
        f"{key} is {tuple(given[key])} in the file and {tuple(own[key].shape)} in the model"
        for key in own
        if key in given and given[key] != own[key].shape
    ]
    sentences = ((missing, "keys missing in the file"), (unknown, "keys unknown to the model"), (shapes, "shapes"))
    return [f"{len(keys)} {what}: {_first(keys)}" for keys, what in sentences if keys]


def _is_counter(key: str) -> bool:
    return key.endswith(".num_batches_tracked")


def _first(keys: Iterable[str]) -> str:
    keys = list(keys)
    return ", ".join(keys[:_SHOWN]) + (", ..." if len(keys) > _SHOWN else "")
