"""A trained network as one safetensors file that says how to build it and how to prepare images for it.

The description is in the header of the file, so that weights and description cannot part. Nothing in a file is
executed: the model is built by its name, as on the command line, and converted layers from a list of known kinds.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from sepconv import models, structure
from sepconv.data import Data
from sepconv.files import name_for_libraries, replacing

FILE = "model.safetensors"
_KEY = "sepconv"


@dataclass(frozen=True)
class Card:
    """What a file says of its network.

    Attributes:
        model: name, as for ``models.create``.
        settings: of that model.
        changes: how the network differs from it (see ``structure``).
        input_shape: of one image, (C, H, W).
        classes: names of the classes.
        mean, std: per channel, that images are normalised with.
        data: name of the data set it was trained on.
    """

    model: str
    settings: dict[str, Any] = field(default_factory=dict)
    changes: list[dict[str, Any]] = field(default_factory=list)
    input_shape: tuple[int, ...] = ()
    classes: list[str] = field(default_factory=list)
    mean: list[float] = field(default_factory=list)
    std: list[float] = field(default_factory=list)
    data: str = ""

    def with_data(self, data: Data) -> Card:
        """The same network, trained on `data`."""
        return replace(
            self,
            input_shape=data.input_shape,
            classes=data.classes,
            mean=data.mean.tolist(),
            std=data.std.tolist(),
            data=data.name,
        )

    def changed_to(self, model: nn.Module) -> Card:
        """The card of a network made of this one by replacing modules."""
        return replace(self, changes=structure.differences(models.create(self.model, **self.settings), model))

    def build(self) -> nn.Module:
        """The network, with random weights."""
        return structure.apply(models.create(self.model, **self.settings), self.changes)

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 (N, C, H, W) -> float32 as the network was trained on."""
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (images.float() / 255 - mean) / std


def write(path: Path, model: nn.Module, card: Card) -> None:
    """Save weights and description; the file is complete or absent.

    Raises:
        ValueError: the settings cannot be written as text.
        OSError: the file cannot be written.
    """
    try:
        description = json.dumps(asdict(card))
    except TypeError as error:
        raise ValueError(f"write: the settings of {card.model} cannot be saved: {error}") from error
    # Copies, since safetensors takes no tensors that share memory: tied weights are written under each of their names.
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    content = save(tensors, metadata={_KEY: description})
    with replacing(path) as file:
        file.write(content)


def read_card(path: Path) -> Card | None:
    """The description in a safetensors file; None if it has none (the file is not ours)."""
    try:
        with name_for_libraries(path) as name, safe_open(name, framework="pt") as file:
            text = (file.metadata() or {}).get(_KEY)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"read_card: {path} is truncated or no safetensors file ({error})") from error
    if text is None:
        return None
    try:
        fields = json.loads(text)
        return Card(**{**fields, "input_shape": tuple(fields["input_shape"])})
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"read_card: the description in {path} is damaged ({error})") from error


def open_model(
    name: str,
    weights: Path | None = None,
    settings: dict[str, Any] | None = None,
    *,
    data: Data | None = None,
    seed: int = 0,
) -> tuple[nn.Module, Card]:
    """A network by name, or from a folder or file that sepconv wrote, with its weights, in evaluation mode.

    Args:
        name: as for ``models.create``, or a folder with ``model.safetensors``, or such a file.
        weights: a safetensors file. If it says that it is of the model `name`, it also gives settings and structure.
        settings: of the model; those given here overrule those of the file.
        data: gives the settings for channels and classes, where neither `settings` nor the file does.
        seed: of the weights where there is no file.

    Raises:
        ValueError: see ``models.create`` and ``models.load_weights``; or `name` is a folder without a model.
    """
    path = _model_path(name)
    if path is not None and (weights is not None or settings):
        raise ValueError(f"{name} is a trained network already: --weights and --set do not go with it")
    weights = weights if path is None else path
    card = read_card(weights) if weights is not None and _may_have_card(weights) else None
    if path is not None and card is None:
        raise ValueError(f"{path} does not say which network it is of: give the model's name and --weights {path}")
    if card is None or (path is None and card.model != name):
        card = Card(name, {**_settings_from(name, data), **(settings or {})})
    elif settings:
        card = replace(card, settings={**card.settings, **settings})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = card.build()
    if weights is not None:
        models.load_weights(model, weights)
    return model.eval(), card


def _settings_from(name: str, data: Data | None) -> dict[str, Any]:
    """Channels and classes as the data has them; the user's own functions get what the user says and no more."""
    if data is None or not (name in models.BUILT_IN or name.startswith("timm/")):
        return {}
    channels = "in_chans" if name.startswith("timm/") else "in_channels"
    return {channels: data.channels, "num_classes": data.num_classes}


def _model_path(name: str) -> Path | None:
    path = Path(name)
    if path.is_dir():
        if not (path / FILE).is_file():
            raise ValueError(f"the folder {path} has no {FILE}: it was not written by sepconv train or convert")
        return path / FILE
    return path if path.suffix == ".safetensors" else None


def _may_have_card(path: Path) -> bool:
    """Whether the file can be looked into; what is wrong with others, ``load_weights`` says better."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return file.read(1) == b"{" and length < path.stat().st_size


def class_names(card: Card, outputs: int) -> Sequence[str]:
    """Names of the classes, or their numbers where none are known."""
    return card.classes if len(card.classes) == outputs else [str(i) for i in range(outputs)]
