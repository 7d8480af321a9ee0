"""What a model must be to be converted, found out before the work: each refusal names the layer and the cause."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from sepconv.convert.forms import AnyForm
from sepconv.convert.outputs import difference, tensors
from sepconv.convert.passes import Hooks, in_words, run, telling_where
from sepconv.convert.replace import replace
from sepconv.convert.sites import Site
from sepconv.layers.borrowed import copied, is_exported
from sepconv.leaves import Inputs

HALF = (torch.bfloat16, torch.float16)


def check_kind(model: nn.Module) -> None:
    """Before anything is done with the model.

    Raises:
        TypeError: it is no module.
        ValueError: it cannot be changed, or has no weights yet.
    """
    if not isinstance(model, nn.Module):
        made = "; convert the module it was exported from" if hasattr(model, "graph_module") else ""
        raise TypeError(f"convert: model must be a torch.nn.Module, got {type(model).__name__}{made}")
    for name, module in model.named_modules():
        _check_kind(in_words(name, module), module)
        for key, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            _check_tensor(f"{key} of {in_words(name, module)}", tensor)


def own_copy(model: nn.Module) -> nn.Module:
    """A copy without what ``torch.compile`` put around its modules, to run and to copy, over the same weights.

    Raises:
        ValueError: it cannot be copied.
    """
    return _eager(copied(_unwrapped(model), "convert", sharing=True))


def _unwrapped(module: Any) -> Any:
    while hasattr(module, "_orig_mod"):
        module = module._orig_mod
    return module


def _eager(model: nn.Module) -> nn.Module:
    for parent in list(model.modules()):
        parent._modules.update({name: _unwrapped(child) for name, child in parent._modules.items()})
    return model


def _check_kind(layer: str, module: nn.Module) -> None:
    if is_exported(module):
        raise ValueError(f"convert: {layer} was made by torch.export; convert the module it was exported from")
    if isinstance(module, torch.jit.ScriptModule):
        raise ValueError(f"convert: {layer} is TorchScript, which cannot be changed; convert the module it was made of")


def _check_tensor(name: str, tensor: Tensor) -> None:
    if is_lazy(tensor):
        raise ValueError(f"convert: {name} has no shape yet; run the model once before it is converted")
    if tensor.is_meta:
        raise ValueError(f"convert: {name} has no values (it is on the meta device); load the weights first")


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Inside, no mode of the caller's (inference mode, autocast) holds, and no random number is drawn from his."""
    cards = {p.device for p in model.parameters() if p.is_cuda}
    kind = "cuda" if cards else "cpu"
    with torch.inference_mode(False), torch.autocast(kind, enabled=False), torch.random.fork_rng(cards):
        yield


def check_values(model: nn.Module) -> None:
    """ValueError where a weight or the statistics of a batch norm are no numbers to compute with."""
    for name, module in model.named_modules():
        tensors = dict(module.named_parameters(recurse=False))
        if isinstance(module, _BatchNorm) and module.running_var is not None:
            tensors |= {key: getattr(module, key) for key in ("running_mean", "running_var")}
            if (module.running_var < 0).any():
                raise ValueError(f"convert: running_var of {in_words(name, module)} holds negative numbers")
        for key, tensor in tensors.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise ValueError(f"convert: {key} of {in_words(name, module)} holds NaN or infinity")


def widen(model: nn.Module) -> dict[str, torch.dtype]:
    """Make float32 of bfloat16 and float16; returns what was changed, by name, for :func:`narrow`."""
    changed = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.dtype in HALF:
            changed[name] = tensor.dtype
            tensor.data = tensor.data.float()
    return changed


def narrow(model: nn.Module, changed: dict[str, torch.dtype], sites: Sequence[Site]) -> None:
    """Give tensors their types back; the layers in the place of a convolution get that of its weight."""
    layers = {site.name: changed[f"{site.name}.weight"] for site in sites if f"{site.name}.weight" in changed}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        of_layer = next((dtype for layer, dtype in layers.items() if name.startswith(f"{layer}.")), None)
        dtype = changed.get(name, of_layer)
        if dtype is not None and tensor.dtype == torch.float32:
            tensor.data = tensor.data.to(dtype)


def check_outputs(model: nn.Module, sites: Sequence[Site], example: Inputs) -> None:
    """ValueError if the shapes of the outputs change as soon as layers do not answer exactly the same."""

    def worse(_: nn.Module, x: Tensor, output: Tensor) -> Tensor:
        return 0.9 * output + 0.1 * output.std()

    with telling_where(model, example), torch.no_grad(), Hooks() as hooks:
        wanted = tensors(run(model, example))
        for site in sites:
            if not site.reason:
                hooks.after(site.conv, worse)
        given = tensors(run(model, example))
    difference(wanted, given, "a layer")


def leave_those_read(model: nn.Module, sites: Sequence[Site], form: AnyForm, example: Inputs) -> None:
    """Give sites their reason to stay whose place a new layer cannot take, because of how the model uses them.

    Tried with layers that are like the new ones from outside and compute what the convolution does: all together, and
    one by one only if that fails.
    """
    candidates = [site for site in sites if not site.reason]
    if candidates and _refusal(model, candidates, form, example):
        for site in candidates:
            site.reason = _refusal(model, [site], form, example)


def _refusal(model: nn.Module, sites: Sequence[Site], form: AnyForm, example: Inputs) -> str:
    called: set[nn.Module] = set()
    originals: list[tuple[Site, Any]] = [(site, model.get_submodule(site.name)) for site in sites]
    try:
        with Hooks() as hooks, torch.no_grad():
            for site, conv in originals:
                layer: Any = form.empty(conv, 1)
                layer.forward = conv.forward
                replace(model, site.names, layer)
                hooks.after(layer, lambda module, *_: called.add(module))
            run(model, example)
            missed = [site.name for site in sites if model.get_submodule(site.name) not in called]
    except Exception as error:  # any code of the model may fail, in any way
        return f"the model needs a normal convolution there ({type(error).__name__}: {error})".splitlines()[0]
    finally:
        for site, conv in originals:
            replace(model, site.names, conv)
    return "the model calls it by another way than its name" if missed else ""
