"""What a conversion has fitted, kept until its run is over: interrupted work goes on from there.

One file holds the tensors of the separable network, what was done to its layers, and what all of that follows from:
settings, checksums of weights and images, and what the original answered. It is used where these are still the same.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from sepconv.convert import Plan
from sepconv.convert.plan import LayerPlan
from sepconv.layers.borrowed import copied, evaluating
from sepconv.leaves import Inputs, leaves
from sepconv.runs import structure
from sepconv.system.files import name_for_libraries, replacing
from sepconv.system.processes import of_first, position
from sepconv.train import checkpoint

FILE = "fitted.safetensors"
ELSEWHERE = "use another folder"
_KEY = "sepconv fitted"
_NETWORK, _ANSWER = "network.", "answer."
_LONGEST_HEADER = 64 << 20
_SAME = 1e-3
"""Relative difference of answers that threads and machines explain; another network's are farther off."""


@dataclass(frozen=True)
class Fitted:
    """A separable network as it was fitted, what was done to its layers, and how it was judged on the way."""

    network: nn.Module
    plan: Plan
    stages: list[dict[str, Any]]


def checksum(tensors: Iterable[Tensor]) -> str:
    """Of kinds, shapes and numbers."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(f"{tensor.dtype} {tuple(tensor.shape)};".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def identity_of(model: nn.Module, images: Inputs, settings: dict[str, Any], *, repeatable: bool) -> dict[str, Any]:
    """What must be the same for a fit to be used again, as plain values.

    Args:
        repeatable: whether the images are the same whenever they are taken; those of a loader may be others by chance.
    """
    state = model.state_dict()
    layers = checkpoint.describe(model)
    described = {"layers": hashlib.sha256(json.dumps(layers).encode()).hexdigest(), "weights": checksum(state.values())}
    found = {**settings, "images": checksum(images.tensors) if repeatable else str(images), "network": described}
    return plain(found)


def plain(found: dict[str, Any]) -> dict[str, Any]:
    """As it comes back from a file."""
    made: dict[str, Any] = json.loads(json.dumps(found))
    return made


def keep(folder: Path, fitted: Fitted, original: nn.Module, images: Inputs, identity: dict[str, Any]) -> None:
    """Write all of it to `folder`; where there is no room, a warning says so and the run goes on without."""
    state = {_NETWORK + name: tensor for name, tensor in fitted.network.state_dict().items()}
    state |= {f"{_ANSWER}{i}": answer for i, answer in enumerate(_answers(original, images))}
    described = {
        "identity": identity,
        "changes": structure.differences(original, fitted.network),
        "plan": fitted.plan.to_dict(),
        "stages": fitted.stages,
    }
    # Copies, since safetensors takes no tensors that share memory.
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    try:
        with replacing(folder / FILE) as file:
            file.write(save(tensors, metadata={_KEY: json.dumps(described)}))
    except OSError as error:
        warnings.warn(f"the fitted network is not kept, should the run be interrupted: {error}", stacklevel=2)


def is_ours(path: Path) -> bool:
    """Whether a file begins as :func:`keep` writes it, whole or not."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return f'"{_KEY}"'.encode() in file.read(min(length, _LONGEST_HEADER))


def find(folder: Path, original: nn.Module, images: Inputs, identity: dict[str, Any]) -> Fitted | None:
    """What `folder` keeps of this very conversion; None where it keeps nothing that can be read.

    Raises:
        ValueError: it is of another one; the message says what differs.
    """
    path = folder / FILE
    found = of_first(_read(path) if position()[0] == 0 and path.exists() else None)
    if found is None:
        return None
    described, state = found
    if difference := difference_in_words(described.get("identity"), identity):
        raise ValueError(f"convert: {folder} holds an interrupted run of another kind ({difference}): {ELSEWHERE}")
    answers = [state[f"{_ANSWER}{i}"] for i in range(sum(name.startswith(_ANSWER) for name in state))]
    if not _same(answers, _answers(original, images)):
        raise ValueError(
            f"convert: {folder} holds an interrupted run of a network that answered otherwise: {ELSEWHERE}"
        )
    try:
        network = _rebuilt(original, described["changes"], state)
        return Fitted(network, _plan(described["plan"]), described["stages"])
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, StopIteration) as error:
        _warn_of_damage(path, error)
        return None


def difference_in_words(found: Any, wanted: dict[str, Any]) -> str:
    """Where two identities first differ; "" where they do not. Checksums say nothing to anybody and are not shown."""
    if not isinstance(found, dict):
        return "it does not say of which"
    difference = checkpoint.first_difference(found, wanted)
    name = difference.partition(" ")[0].rpartition(".")[2]
    return f"its {name} are others" if name in ("images", "weights", "layers") else difference


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    try:
        described = _description(path)
        if described is None:
            raise ValueError("it has no description")
        with name_for_libraries(path) as name, safe_open(name, framework="pt") as file:
            return described, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, SafetensorError) as error:
        _warn_of_damage(path, error)
        return None


def _warn_of_damage(path: Path, error: Exception) -> None:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    warnings.warn(f"{path} is damaged ({reason}): the conversion begins anew", stacklevel=2)


def _description(path: Path) -> dict[str, Any] | None:
    try:
        with name_for_libraries(path) as name, safe_open(name, framework="pt") as file:
            text = (file.metadata() or {}).get(_KEY)
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    found = None if text is None else json.loads(text)
    return found if isinstance(found, dict) else None


@torch.no_grad()
def _rebuilt(original: nn.Module, changes: list[dict[str, Any]], state: dict[str, Tensor]) -> nn.Module:
    network: nn.Module = copied(original, "convert")
    modes = {name: module.training for name, module in network.named_modules()}
    structure.apply(network, changes)
    for name, module in network.named_modules():
        # A new layer, and what is inside it, has the mode of the convolution that it stands for.
        module.training = modes[next(path for path in _above(name) if path in modes)]
    device = next((p.device for p in original.parameters()), torch.device("cpu"))
    found = {name.removeprefix(_NETWORK): tensor for name, tensor in state.items() if name.startswith(_NETWORK)}
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        if name in found:
            tensor.data = tensor.data.to(device, found[name].dtype)
    network.load_state_dict(found)
    return network


def _above(name: str) -> list[str]:
    """The name and those of the modules around it."""
    parts = name.split(".") if name else []
    return [".".join(parts[:i]) for i in range(len(parts), -1, -1)]


def _plan(found: dict[str, Any]) -> Plan:
    layers = [LayerPlan(**{**row, "kernel_size": tuple(row["kernel_size"])}) for row in found["layers"]]
    own = {entry.name: found[entry.name] for entry in fields(Plan)}
    return Plan(**{**own, "layers": layers})


@torch.no_grad()
def _answers(model: nn.Module, images: Inputs) -> list[Tensor]:
    """What the network says of two samples."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with evaluating(model):
        return [leaf.float().cpu() for leaf in leaves(images[:2].to(device).run(model)).values()]


def _same(wanted: list[Tensor], given: list[Tensor]) -> bool:
    if [t.shape for t in wanted] != [t.shape for t in given]:
        return False
    pairs = [(a, b) for a, b in zip(wanted, given, strict=True) if a.numel()]
    return all(float((a - b).abs().max()) <= _SAME * float(a.abs().max()) for a, b in pairs)
