"""The convolutions of a network: which can be made separable, in what order they run, what directly follows them.

Nothing is rewritten here. A module is found by its identity, so one that is registered under two names or called
twice is one site; order, sizes and followers are recorded from a real run, so any forward function will do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.prune import BasePruningMethod

from sepconv.convert.passes import Hooks, in_words, run, telling_where
from sepconv.leaves import Inputs
from sepconv.norms import scale_and_shift_of

Skip = Sequence[str] | Callable[[str, nn.Module], bool]

_UNDONE_BY = {"WeightNorm": "remove_weight_norm", "SpectralNorm": "remove_spectral_norm"}
LISTED = 4
"""Names of layers told for one reason."""

_PLAIN = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@dataclass
class Site:
    """One convolution of the network.

    ``names`` are all names it is registered under, ``reason`` says why it must stay as it is ("" if it need not),
    ``calls`` how often one forward pass runs it, ``inputs`` and ``outputs`` the shapes of its calls without the
    batch, and ``norm`` names the batch norm that directly follows it ("" if none is known to).
    """

    names: tuple[str, ...]
    conv: _ConvNd
    reason: str = ""
    inputs: list[tuple[int, ...]] = field(default_factory=list)
    outputs: list[tuple[int, ...]] = field(default_factory=list)
    norm: str = ""

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def calls(self) -> int:
        return len(self.outputs)

    @property
    def pixels(self) -> int:
        """Output pixels of one image, over all calls."""
        return sum(math.prod(shape[1:]) for shape in self.outputs)

    @property
    def input_pixels(self) -> int:
        return sum(math.prod(shape[1:]) for shape in self.inputs)


def _tied(model: nn.Module) -> set[int]:
    """Ids of parameters that several modules hold."""
    holders: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    return {key for key, count in holders.items() if count > 1}


def _must_stay(conv: _ConvNd, tied: set[int]) -> str:
    """Why a convolution cannot be made separable, "" if it can."""
    dims = len(conv.kernel_size)
    if isinstance(conv, _ConvTransposeNd):
        return "a transposed convolution"
    if conv.groups != 1:
        return "already depthwise" if conv.groups == conv.in_channels else f"grouped (groups={conv.groups})"
    if math.prod(conv.kernel_size) == 1:
        return "already pointwise (1x1)"
    if computed := _computed(conv):
        return computed
    plain: Any = _PLAIN[dims]
    if type(conv).forward is not plain.forward or type(conv)._conv_forward is not plain._conv_forward:
        kind = type(conv)
        name = f"{kind.__module__}.{kind.__name__}" if kind.__name__ == plain.__name__ else kind.__name__
        return f"{name} has a forward of its own"
    if not conv.weight.is_floating_point():
        return f"its weight is {conv.weight.dtype}"
    if id(conv.weight) in tied:
        return "another module uses its weight"
    if conv._forward_hooks or conv._forward_pre_hooks or conv._backward_hooks or conv._backward_pre_hooks:
        return "it has hooks"
    return ""


def _computed(conv: Any) -> str:
    """Whether the weight is made of other tensors before each call, by what, and how that is undone."""
    for hook in conv._forward_pre_hooks.values():
        kind = type(hook).__name__
        if isinstance(hook, BasePruningMethod):
            return f"it is pruned; torch.nn.utils.prune.remove(layer, {hook._tensor_name!r}) makes that permanent"
        if kind in _UNDONE_BY:
            return f"its weight is computed ({kind}); torch.nn.utils.{_UNDONE_BY[kind]}(layer) makes it a plain one"
    if hasattr(conv, "parametrizations"):
        names = {key: [type(p).__name__ for p in made] for key, made in conv.parametrizations.items()}
        key, kinds = next(iter(names.items()))
        undo = f"torch.nn.utils.parametrize.remove_parametrizations(layer, {key!r})"
        return f"its {key} is computed ({', '.join(kinds)}); {undo} makes it a plain one"
    return "" if "weight" in conv._parameters else "its weight is no parameter"


def find_sites(model: nn.Module, skip: Skip = ()) -> list[Site]:
    """All convolutions in the order of registration, with what their structure alone says.

    Raises:
        ValueError: ``skip`` names a module that does not exist.
    """
    named: dict[int, tuple[list[str], nn.Module]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        named.setdefault(id(module), ([], module))[0].append(name)
    if not callable(skip):
        known = {name for names, _ in named.values() for name in names}
        for name in skip:
            if name not in known:
                raise ValueError(f"convert: skip names {name!r}, which is no module of {type(model).__name__}")
    tied, sites = _tied(model), []
    for names, module in named.values():
        if isinstance(module, _ConvNd):
            site = Site(tuple(names), module, _must_stay(module, tied))
            if not site.reason and _skipped(site, skip):
                site.reason = "skipped as asked"
            sites.append(site)
    return sites


def _skipped(site: Site, skip: Skip) -> bool:
    if callable(skip):
        return any(skip(name, site.conv) for name in site.names)
    return any(name == s or name.startswith(s + ".") for name in site.names for s in skip)


def record(model: nn.Module, sites: list[Site], example: Inputs, hint: str = "") -> list[Site]:
    """Run ``example`` once: fill in shapes, calls and followers, and put the sites in the order of their first call.

    A batch norm follows a convolution if it is called on the very tensor that the convolution returned, not changed in
    place since. Convolutions that never ran come last, with that as their reason.

    Raises:
        ValueError: the model fails, or a convolution's output is not finite; the message names the layer.
    """
    record = _Record()
    with Hooks() as hooks, telling_where(model, example, hint), torch.no_grad():
        for site in sites:
            hooks.after(site.conv, record.conv_ran(site))
        for name, module in model.named_modules():
            if isinstance(module, _BatchNorm):
                hooks.before(module, record.norm_runs(name))
        run(model, example)
    for result in record.results:
        if not result.output.isfinite().all():
            layer = in_words(result.site.name, result.site.conv)
            raise ValueError(f"convert: the output of {layer} holds NaN or infinity on calibration images")
    idle = [site for site in sites if not site.outputs]
    for site in idle:
        site.reason = site.reason or "its forward never ran on the images"
    return record.order + idle


class _Result(NamedTuple):
    """What a convolution returned; the version tells whether it was changed in place since."""

    site: Site
    output: Tensor
    version: int


def _version(tensor: Tensor) -> int:
    """How often it was changed in place, which tensors of inference mode do not count."""
    return 0 if tensor.is_inference() else tensor._version


class _Record:
    """What convolutions and batch norms did, in one pass."""

    def __init__(self) -> None:
        self.order: list[Site] = []
        self.results: list[_Result] = []

    def conv_ran(self, site: Site) -> Callable[[nn.Module, Tensor, Tensor], None]:
        def hook(conv: nn.Module, x: Tensor, output: Tensor) -> None:
            if not site.outputs:
                self.order.append(site)
            if output.dim() != len(site.conv.kernel_size) + 2:
                site.reason = site.reason or "called without a batch dimension"
            site.inputs.append(tuple(x.shape[1:]))
            site.outputs.append(tuple(output.shape[1:]))
            self.results.append(_Result(site, output, _version(output)))

        return hook

    def norm_runs(self, name: str) -> Callable[[nn.Module, Tensor], None]:
        def hook(norm: nn.Module, x: Tensor) -> None:
            for result in self.results:
                if x is result.output and _version(x) == result.version:
                    result.site.norm = name

        return hook


def reasons(sites: Sequence[Site]) -> str:
    """Why sites stay as they are: each reason with the sites it holds for."""
    found: dict[str, list[str]] = {}
    for site in sites:
        if site.reason:
            found.setdefault(site.reason, []).append(site.name)
    return "; ".join(f"{_listed(names)}: {reason}" for reason, names in found.items())


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


class _NormTracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return isinstance(module, _ConvNd | _BatchNorm) or super().is_leaf_module(module, qualified_name)


def trace_norms(model: nn.Module, sites: list[Site]) -> str:
    """Fill in followers without any input, by symbolic tracing. Returns "" or why it was not possible."""
    try:
        graph = _NormTracer().trace(model)
    except Exception as error:  # any code of the model may fail on a symbolic value, in any way
        return f"{type(error).__name__}: {error}".splitlines()[0]
    modules = dict(model.named_modules(remove_duplicate=False))
    by_id = {id(site.conv): site for site in sites}
    for node, norm in _norm_calls(graph, modules):
        source = node.args[0]
        if isinstance(source, fx.Node) and source.op == "call_module":
            site = by_id.get(id(modules[str(source.target)]))
            if site is not None:
                site.norm = norm
    return ""


def _norm_calls(graph: fx.Graph, modules: dict[str, nn.Module]) -> Iterator[tuple[fx.Node, str]]:
    for node in graph.nodes:
        if node.op == "call_module" and isinstance(modules[str(node.target)], _BatchNorm) and node.args:
            yield node, str(node.target)


def norm_scale(model: nn.Module, site: Site) -> Tensor | None:
    """gamma / sqrt(var + eps) of the batch norm that follows, which weighs the error of each output channel: (O,)."""
    if not site.norm:
        return None
    norm: Any = model.get_submodule(site.norm)
    if norm.running_var is None or norm.num_features != site.conv.out_channels:
        return None
    return scale_and_shift_of(norm)[0].abs()
