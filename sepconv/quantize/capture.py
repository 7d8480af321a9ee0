"""A model in evaluation mode as one graph of PyTorch's operations, with the parameters of the model under their names.

Layers of any library and functional code look alike in it. Batches and images of other sizes may follow, as far as the
model's code is the same for them. ``compile`` records for one size and in a quarter of a second; here it takes seconds,
but the result is a module that lives on: it is trained, saved and exported.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.fx.graph import CodeGen
from torch.utils import _pytree as pytree

from sepconv.leaves import Inputs, leaves
from sepconv.quantize.layers import forget_unused

AGREEMENT = 1e-3
"""Largest difference between a model and its graph, relative to the largest output."""


def capture(model: nn.Module, example: Inputs) -> fx.GraphModule:
    """The graph, as a module that shares the model's parameters.

    Args:
        model: in evaluation mode.
        example: a batch of at least two samples, unless its samples cannot be told apart.

    Raises:
        ValueError: the model cannot be captured, or its graph answers differently.
    """
    graph_module = _graph_of(model, example)
    _without_changes_in_place(graph_module)
    graph_module = _plain(graph_module, example)
    check_agreement(model, graph_module, example)
    if example.divisible:
        check_agreement(model, graph_module, example[:1])
    return graph_module


def _graph_of(model: nn.Module, example: Inputs) -> fx.GraphModule:
    """By ``torch.export``, for as many other sizes as it can be had."""
    reason: Exception | None = None
    for sizes in ((0, 2, 3, 4), (0,)):
        dynamic = pytree.tree_map(lambda leaf, s=sizes: _dimensions(leaf, s), (example.args, example.kwargs))
        named = _by_name(model, *dynamic)
        try:
            with _quietly(), torch.no_grad():
                program = torch.export.export(
                    model, example.args, example.kwargs or None, dynamic_shapes=named, strict=False
                )
                module = program.module(check_guards=False)
            assert isinstance(module, fx.GraphModule)
            return module
        except Exception as error:  # any code of the model may fail in any way
            reason = reason or error
    said = f"{type(reason).__name__}: {reason}".strip().splitlines()[0].rstrip(": ")
    raise ValueError(
        f"quantize: PyTorch cannot export {type(model).__name__} ({said}); quantize a part of it whose code does not "
        "depend on values"
    ) from reason


@contextmanager
def _quietly() -> Iterator[None]:
    """What PyTorch finds hard about sizes it writes down in hundreds of lines, and goes on; the result is compared."""
    logger = logging.getLogger("torch.fx.experimental")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


def _dimensions(leaf: Any, sizes: Sequence[int]) -> Any:
    if not isinstance(leaf, Tensor):
        return None
    return {dim: torch.export.Dim.AUTO for dim in sizes if dim < leaf.dim()}


def _by_name(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """As ``torch.export`` wants it: positional ones in a tuple, or all by name."""
    if not kwargs:
        return args
    names = list(inspect.signature(model.forward).parameters)
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _without_changes_in_place(module: fx.GraphModule) -> None:
    """What changes a tensor becomes what makes another: export lets all later uses refer to the result already."""
    for node in list(module.graph.nodes):
        if not isinstance(node.target, OpOverload) or not node.target._schema.is_mutable:
            continue
        name = node.target.overloadpacket.__name__
        packet = getattr(torch.ops.aten, name.removesuffix("_"), None)
        pure = getattr(packet, node.target._overloadname, None) if name.endswith("_") and packet else None
        if pure is None or (isinstance(node.args[0], fx.Node) and node.args[0].op == "get_attr"):
            raise ValueError(
                f"quantize: the model cannot be captured, it changes a tensor that it keeps ({node.target})"
            )
        node.target = pure
    module.graph.lint()


def _plain(module: fx.GraphModule, example: Inputs) -> fx.GraphModule:
    """A module that trains, evaluates, is copied and pickled as any other; an exported one refuses some of that."""
    graph = module.graph
    output_spec = graph._codegen.pytree_info.out_spec if hasattr(graph._codegen, "pytree_info") else None
    simple = all(isinstance(value, Tensor) for value in (*example.args, *example.kwargs.values()))
    if output_spec is not None and simple and _is_plain(output_spec):
        [output] = [node for node in graph.nodes if node.op == "output"]
        output.args = (pytree.tree_unflatten(list(output.args[0]), output_spec),)
        graph.set_codegen(CodeGen())
    for node in list(graph.nodes):
        if node.op in ("get_attr", "call_module") and not node.users:
            graph.erase_node(node)
    graph._tracer_cls = None
    found = fx.GraphModule(module, graph, "Quantized")
    found.meta = {}
    forget_unused(found)
    return found.eval()


def _is_plain(spec: Any) -> bool:
    """Whether an output is made of tuples, lists and dicts alone."""
    if spec.is_leaf():
        return True
    return spec.type in (tuple, list, dict) and all(map(_is_plain, spec.children()))


@torch.no_grad()
def check_agreement(model: nn.Module, captured: nn.Module, inputs: Inputs) -> None:
    """ValueError if a model and its graph do not give the same."""
    wanted, given = leaves(inputs.run(model)), leaves(inputs.run(captured))
    for name, want in wanted.items():
        have = given.get(name)
        if have is None or have.shape != want.shape:
            shapes = tuple(want.shape), None if have is None else tuple(have.shape)
            raise ValueError(f"quantize: the captured graph gives {shapes[1]} and the model {shapes[0]} for {inputs}")
        error = float((have - want).abs().max()) if want.numel() else 0.0
        largest = float(want.abs().max()) if want.numel() else 0.0
        if not error <= AGREEMENT * max(largest, 1e-6):
            raise ValueError(
                f"quantize: the model answers differently from its captured graph, by {error:.2g} of {largest:.2g}: "
                "it is random, or its code depends on values"
            )
