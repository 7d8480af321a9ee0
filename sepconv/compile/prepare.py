"""From a model and its inputs to a prepared network: captured, rewritten, laid out, bound and compared with the model.

Nothing that goes wrong on the way is the caller's, but for the model's own complaint about its input: the model runs
through PyTorch, and the reason is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils._pytree import TreeSpec

from sepconv.compile.capture import CaptureError, capture, first_line
from sepconv.compile.copies import trial_copy
from sepconv.compile.looks import is_channels_last
from sepconv.compile.network import PreparedNetwork
from sepconv.compile.passes import rewrite
from sepconv.compile.store import Store
from sepconv.compile.verify import ThroughPyTorch, agreement, disagreement, rounded, shaken, tolerance

EMPTY = "the batch is empty"


def prepare(
    frozen: nn.Module, leaves: Sequence[Any], spec: TreeSpec, store: Store, tune: bool
) -> PreparedNetwork | str:
    """A network for inputs of these sizes, or why the model runs through PyTorch as a whole.

    Args:
        frozen: the model, whose weights do not change any more.
        leaves: the arguments of a call, flat. spec: their structure.
        store: the constants of all sizes of this model.
        tune: measure alternatives for each group.

    Raises:
        ValueError: the model does not accept these inputs.
    """
    if any(isinstance(leaf, Tensor) and leaf.numel() == 0 for leaf in leaves):
        return EMPTY
    with apart():
        # The model has the first word on its input; with buffers of its own, since it may count its calls in one.
        try:
            model = trial_copy(frozen, buffers=False)
        except Exception as error:
            return f"it cannot be copied ({first_line(error)})"
        expected = _expected(model, [_copied(leaf) for leaf in leaves], spec)
        try:
            graph, result_spec = _captured(frozen, leaves, spec)
        except CaptureError as error:
            return f"the model cannot be captured: {error}"
        except Exception as error:
            return f"capturing it failed ({first_line(error)})"
        try:
            rewrite(graph, store)
            network = PreparedNetwork(graph, store, expected, result_spec, tune)
            # The second call has other numbers: zeros would hide most defects, and a model may count its calls.
            others = [shaken(leaf) for leaf in leaves]
            pairs = ((leaves, expected), (others, _expected(model, others, spec)))
            run = partial(_expected, model, spec=spec)
            return next(filter(None, (_disagreement(network, run, *pair) for pair in pairs)), network)
        except Exception as error:
            return f"preparing it failed ({first_line(error)})"


def as_captured(x: Tensor) -> Tensor:
    """Contiguous or channels_last, detached."""
    x = x.detach()
    return x if x.is_contiguous() or is_channels_last(x) else x.contiguous()


def _captured(frozen: nn.Module, leaves: Sequence[Any], spec: TreeSpec) -> tuple[fx.Graph, TreeSpec]:
    """The operations, and the structure of the result."""
    model, result = trial_copy(frozen), spec

    def flat(*values: Any) -> list[Any]:
        nonlocal result
        args, kwargs = pytree.tree_unflatten(list(values), spec)
        outputs, result = pytree.tree_flatten(model(*args, **kwargs))
        return outputs

    graph = capture(flat, [as_captured(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves])
    return graph, result


def _expected(model: nn.Module, leaves: Sequence[Any], spec: TreeSpec) -> list[Any]:
    """The leaves of the model's own result, or its own complaint about the input."""
    args, kwargs = pytree.tree_unflatten(list(leaves), spec)
    try:
        with ThroughPyTorch():
            return pytree.tree_leaves(model(*args, **kwargs))
    except Exception as error:  # whatever the model raises
        first = str(error).strip().split("\n")[0]
        shapes = [tuple(leaf.shape) for leaf in leaves if isinstance(leaf, Tensor)]
        raise ValueError(f"compile: the model does not accept inputs of shape {shapes}: {first}") from error


def _disagreement(
    network: PreparedNetwork, run: Callable[..., list[Any]], leaves: Sequence[Any], expected: Sequence[Any]
) -> str:
    tensors = network.run([as_captured(leaf) for leaf in leaves if isinstance(leaf, Tensor)])
    got = network.leaves(tensors)
    usual = agreement({place.form.number for place in network.program.places})
    if not disagreement(got, expected, usual):
        return ""
    # Some networks multiply rounding errors: this one is asked only where it has to be.
    return disagreement(got, expected, tolerance(usual, run([rounded(leaf) for leaf in leaves]), expected))


def _copied(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


@contextmanager
def apart() -> Iterator[None]:
    """Whatever mode the caller is in; nor are the caller's random numbers drawn."""
    random = torch.random.fork_rng(devices=[])
    with random, torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
        yield
