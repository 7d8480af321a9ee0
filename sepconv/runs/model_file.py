"""A trained network as one safetensors file that says how to build it and how to prepare images for it.

The description is in the header of the file, so that weights and description cannot part. Nothing in a file is trusted:
it names a built-in model with plain settings and changed layers of known kinds, and the network that it describes must
have the tensors that the file holds, which is found out before anything of their size is made. Names that run other
code (``package.module:function``, ``timm/NAME``) count only where the user gives the same name.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from sepconv import models
from sepconv.cost import count
from sepconv.data import Data, SampleData
from sepconv.models import weights as weight_files
from sepconv.quantize.saving import packed, unpack
from sepconv.runs import card as cards
from sepconv.runs import structure
from sepconv.runs.card import Card as Card
from sepconv.runs.timm_folder import timm_folder
from sepconv.system.files import name_for_libraries, replacing

FILE = "model.safetensors"
_KEY = "sepconv"
_LARGEST_OUTPUT = 2**30
"""Numbers that a layer of a network from a file may make of one image."""
_TIMM_LOADS = ("checkpoint_path", "cache_dir", "pretrained_cfg", "pretrained_cfg_overlay")
"""Settings by which timm would read further files."""


def write(path: Path, model: nn.Module, card: Card) -> None:
    """Save weights and description; the file is complete or absent.

    Raises:
        ValueError: the description could not be read again, such as settings that are no plain values.
        OSError: the file cannot be written.
    """
    try:
        description = card.to_text()
    except ValueError as error:
        raise ValueError(f"write: the description of {card.model} cannot be saved: {error}") from error
    # Copies, since safetensors takes no tensors that share memory: tied weights are written under each of their names.
    state = packed(model) if card.quantized else model.state_dict()
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    content = save(tensors, metadata={_KEY: description})
    with replacing(path) as file:
        file.write(content)


def read_card(path: Path) -> Card | None:
    """The description in a safetensors file; None if it has none (the file is not ours).

    Raises:
        ValueError: no safetensors file, or the description in it is damaged; one line that names the file.
    """
    weight_files.check_file("read_card", path)
    try:
        with name_for_libraries(path) as name, safe_open(name, framework="pt") as file:
            text = (file.metadata() or {}).get(_KEY)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"read_card: {path} is truncated or no safetensors file ({error})") from error
    if text is None:
        return None
    try:
        return cards.from_text(text)
    except ValueError as error:
        raise ValueError(f"read_card: the description in {path} is damaged ({error})") from error


def open_model(
    name: str,
    weights: Path | None = None,
    settings: dict[str, Any] | None = None,
    *,
    data: Data | SampleData | None = None,
    seed: int = 0,
    trust: bool = False,
) -> tuple[nn.Module, Card]:
    """A network by name, or from a folder or file that sepconv wrote, with its weights, in evaluation mode.

    Args:
        name: as for ``models.create``, or a folder with ``model.safetensors``, or such a file; or a folder as timm
            saves it for Hugging Face.
        weights: a file as for ``models.load_weights``. If it says that it is of the model `name`, it also gives
            settings and structure.
        settings: of the model; those given here overrule those of the file.
        data: gives the settings for channels and classes, where neither `settings` nor the file does.
        seed: of the weights where there is no file.
        trust: call whatever function a file names as its model. Otherwise a file alone may name built-in models only.

    Raises:
        ValueError: see ``models.create`` and ``models.load_weights``; or `name` is a folder without a model, or the
            file is damaged, describes another network than it holds, or names a model that is not built in.
    """
    path = model_path(name)
    if path is not None and (weights is not None or settings):
        raise ValueError(f"{name} is a trained network already: --weights and --set do not go with it")
    if (folder := timm_folder(name)) is not None:
        network, card = open_model(folder.model, folder.weights, folder.settings)
        return network, replace(card, classes=folder.classes)
    weights = weights if path is None else path
    found = card_of(name, weights)
    if found is None:
        given = settings or {}
        # Trained weights that the library brings have classes of their own.
        card = Card(name, given if given.get("pretrained") else {**_settings_from(name, data), **given})
        if name in models.BUILT_IN:
            _check_room(_without_data(card))
        return _build(card, weights, seed).eval(), card
    assert weights is not None
    if not (trust or path is None or found.model in models.BUILT_IN):
        raise ValueError(
            f"{path} names the model {found.model!r}, which runs code from outside sepconv: if you know that code, "
            f"give its name yourself, {found.model} --weights {path} (in Python also: trust=True)"
        )
    card = replace(found, settings={**_settings_of(found), **(settings or {})})
    try:
        _check_described(card, weights)
    except ValueError as error:
        raise ValueError(f"open_model: {weights} does not hold the network that it describes: {error}") from error
    return _build(card, weights, seed).eval(), card


def card_of(name: str, weights: Path | None = None) -> Card | None:
    """What our own file says of the network that it holds; None where it is no such file, or of another model.

    Args:
        name, weights: as for :func:`open_model`.

    Raises:
        ValueError: the file cannot be read, or `name` is a folder or file that does not say which network it is of.
    """
    path = model_path(name)
    if timm_folder(name) is not None:
        return None
    file = weights if path is None else path
    if file is None:
        return None
    weight_files.check_file("open_model", file)
    found = read_card(file) if _may_have_card(file) else None
    if path is None:
        return found if found is not None and found.model == name else None
    if found is None:
        raise ValueError(f"{path} does not say which network it is of: give the model's name and --weights {path}")
    return found


def _build(card: Card, weights: Path | None, seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = card.build()
        if weights is not None and card.quantized:
            model = card.build_quantized(model)
    if weights is not None:
        models.load_weights(model, weights)
        if card.quantized:
            unpack(model)
    if unset := next((key for key, tensor in model.state_dict().items() if tensor.is_meta), ""):
        raise ValueError(f"open_model: {unset} of {card.model} has no values (it is on the meta device)")
    return model


def _without_data(card: Card) -> nn.Module:
    with torch.device("meta"):
        return card.build()


def _check_described(card: Card, weights: Path) -> None:
    """ValueError unless the network has the tensors of the file, takes its images and needs no more memory than such.

    Of a model that is not built in, the changed layers alone are looked at.
    """
    shapes = weight_files.shapes(weights)
    if card.model not in models.BUILT_IN:
        with torch.device("meta"):
            changed = [structure.build(change) for change in card.changes if "same_as" not in change]
        if sum(map(_values, changed)) > sum(shape.numel() for shape in shapes.values()):
            raise ValueError("its changed layers have more weights than the file")
        return
    planned = _without_data(card)
    if card.quantized:
        _check_layers(planned, shapes)
    else:
        weight_files.check_fit(planned, shapes, weights)
    _check_room(planned)
    if card.input_shape:
        largest = max(
            (torch.Size(row.output_shape).numel() for row in count(planned, card.input_shape).layers), default=0
        )
        if largest > _LARGEST_OUTPUT:
            raise ValueError(f"a layer makes {largest:,} numbers of one image of shape {card.input_shape}")


def _check_layers(planned: nn.Module, shapes: Mapping[str, torch.Size]) -> None:
    """ValueError unless a quantized network's layers are in the file; their norms became part of them."""
    for name, tensor in planned.named_parameters():
        if tensor.dim() > 1 and shapes.get(name) != tensor.shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)} in the model and {shapes.get(name)} in the file")


def _values(model: nn.Module) -> int:
    return sum(tensor.numel() for tensor in model.state_dict().values())


def _check_room(planned: nn.Module) -> None:
    """ValueError where the weights would not fit into this machine's memory."""
    needed = sum(tensor.numel() * tensor.element_size() for tensor in planned.state_dict().values())
    if not hasattr(os, "sysconf"):
        return
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise ValueError(
            f"the weights of {type(planned).__name__} with these settings need {needed >> 20:,} MB, "
            f"more than the {memory >> 20:,} MB of this machine"
        )


def _settings_of(card: Card) -> dict[str, Any]:
    """Those of the file; timm must not load other weights for it."""
    if not card.model.startswith(("timm/", "torchvision/")):
        return card.settings
    if loading := sorted(card.settings.keys() & _TIMM_LOADS):
        raise ValueError(f"open_model: a file must not have other files read: its setting {loading[0]!r} is refused")
    return {name: value for name, value in card.settings.items() if name != "pretrained"}


def _settings_from(name: str, data: Data | SampleData | None) -> dict[str, Any]:
    """Channels and classes as the data has them; the user's own functions get what the user says and no more."""
    if not isinstance(data, Data):
        return {}
    classes = {"num_classes": data.num_classes} if data.classes else {}
    if name.startswith("torchvision/"):
        return classes
    if name.startswith("timm/"):
        return {"in_chans": data.channels, **classes}
    return {"in_channels": data.channels, **classes} if name in models.BUILT_IN else {}


def model_path(name: str) -> Path | None:
    """The file with the network, where `name` is a folder or file that sepconv wrote and not the name of a model."""
    path = Path(name)
    if path.is_dir():
        if not (path / FILE).is_file():
            raise ValueError(f"the folder {path} has no {FILE}: it was not written by sepconv train or convert")
        return path / FILE
    return path if path.suffix == ".safetensors" else None


def _may_have_card(path: Path) -> bool:
    """Whether the file can be looked into; what is wrong with others, ``load_weights`` says better."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return file.read(1) == b"{" and length < path.stat().st_size


def class_names(card: Card, outputs: int) -> Sequence[str]:
    """Names of the classes, or their numbers where none are known."""
    return card.classes if len(card.classes) == outputs else [str(i) for i in range(outputs)]
