"""Local folders as timm saves them for Hugging Face: which of timm's networks the weights are of."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
_LARGEST_FILE = 8 << 20
_ARGUMENTS = ("in_chans", "global_pool", "img_size")
"""Of timm's models, that a file may set; others could have it read further files."""


@dataclass(frozen=True)
class TimmFolder:
    """What a folder says of its network.

    Attributes:
        model: such as "timm/resnet18"; a name that timm must know, which is all that a folder may choose.
        settings: of that model.
        weights: the file with its weights.
        classes: names of its outputs, where the folder has them.
    """

    model: str
    settings: dict[str, Any]
    weights: Path
    classes: list[str]


def timm_folder(name: str) -> TimmFolder | None:
    """The network in a folder with timm's ``config.json`` and ``model.safetensors``; None for anything else.

    Nothing in the folder is executed.

    Raises:
        ValueError: the description is damaged, or of a network of transformers.
    """
    path = Path(name) / CONFIG
    if not path.is_file() or not (Path(name) / WEIGHTS).is_file() or path.stat().st_size > _LARGEST_FILE:
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"open_model: {path} is damaged ({error})") from error
    if isinstance(found, dict) and "architectures" in found:
        raise ValueError(f"open_model: {path} describes a network of transformers, of which only timm's can be built")
    if not isinstance(found, dict) or not isinstance(found.get("architecture"), str):
        return None
    given = found.get("model_args")
    arguments = given if isinstance(given, dict) else {}
    settings = {key: arguments[key] for key in _ARGUMENTS if isinstance(arguments.get(key), int | str)}
    if isinstance(found.get("num_classes"), int):
        settings["num_classes"] = found["num_classes"]
    names = found.get("label_names")
    classes = names if isinstance(names, list) and all(isinstance(one, str) for one in names) else []
    return TimmFolder(f"timm/{found['architecture']}", settings, Path(name) / WEIGHTS, classes)
