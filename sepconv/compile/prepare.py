"""From a model and its inputs to a prepared network: captured, rewritten, laid out, bound and compared with the model.

Nothing that goes wrong on the way is the caller's, but for the model's own complaint about its input: the model runs
through PyTorch, and the reason is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils._pytree import TreeSpec

from sepconv.compile.capture import CaptureError, capture, first_line
from sepconv.compile.constants import first_unseen
from sepconv.compile.copies import trial_copy
from sepconv.compile.looks import is_channels_last
from sepconv.compile.network import PreparedNetwork
from sepconv.compile.passes import rewrite
from sepconv.compile.precision import BFLOAT16, FLOAT32, missing, precision_of
from sepconv.compile.program import Program
from sepconv.compile.steps import write_program
from sepconv.compile.store import Store
from sepconv.compile.verify import (
    NUDGES,
    InBfloat16,
    Nudged,
    ThroughPyTorch,
    agreement,
    disagreement,
    rounded,
    shaken,
    tolerance,
    tolerance_of_few_bits,
)

EMPTY = "the batch is empty"


class How(NamedTuple):
    """What is asked of a network: one of ``PRECISIONS``, and whether alternatives are measured for each group."""

    precision: str = FLOAT32
    tune: bool = False


def prepare(frozen: nn.Module, leaves: Sequence[Any], spec: TreeSpec, store: Store, how: How) -> PreparedNetwork | str:
    """A network for inputs of these sizes, or why the model runs through PyTorch as a whole.

    Args:
        frozen: the model, whose weights do not change any more.
        leaves: the arguments of a call, flat. spec: their structure.
        store: the constants of all sizes of this model.

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
        checks = _Checks(model, spec, [_Check(leaves, _expected(model, [_copied(leaf) for leaf in leaves], spec))])
        if reason := _unseen(checks.known[0].expected):
            return f"the model cannot be captured: {reason}"
        note = missing(how.precision)
        network = _built(frozen, checks, store, how._replace(precision=FLOAT32) if note else how)
        if isinstance(network, str) and how.precision != FLOAT32 and not note:
            note, network = network, _built(frozen, checks, store, how._replace(precision=FLOAT32))
        if isinstance(network, PreparedNetwork):
            network.note = note or _not_used(network, how.precision)
        return network


def _not_used(network: PreparedNetwork, precision: str) -> str:
    """Why nothing is kept in the numbers that were asked for; "" if something is."""
    lost = precision == BFLOAT16 and precision_of(network.program.numbers) == FLOAT32
    return f"no step of it takes less time in {precision}" if lost else ""


class WrittenModel:
    """A program for inputs of one size, with kernels for the machine that they are made for, and the model's answers.

    Attributes:
        model: a copy.
        inputs: the tensors among the arguments that it was written for, as the program takes them.
        expected: the tensors that the model gives for them.
    """

    def __init__(self, model: nn.Module, leaves: Sequence[Any], spec: TreeSpec, store: Store, precision: str) -> None:
        """
        Raises:
            CaptureError: the model cannot be captured as a whole.
            ValueError: it does not accept these inputs.
        """
        self.model, self.store, self._leaves, self._spec = model, store, leaves, spec
        with apart():
            self._expected = self.run(leaves)
            if reason := _unseen(self._expected):
                raise CaptureError(reason)
            graph, _ = _captured(model, leaves, spec)
            rewrite(graph, store, precision)
            self.program = write_program(graph, self.expected)

    @property
    def inputs(self) -> list[Tensor]:
        return [as_captured(leaf) for leaf in self._leaves if isinstance(leaf, Tensor)]

    @property
    def expected(self) -> list[Tensor]:
        return [result for result in self._expected if isinstance(result, Tensor)]

    def run(self, leaves: Sequence[Any]) -> list[Any]:
        """The model's own results, for arguments of that structure."""
        return _expected(trial_copy(self.model, buffers=False), [_copied(leaf) for leaf in leaves], self._spec)

    def again(self) -> None:
        """The model itself, not a copy, once more on its example."""
        args, kwargs = pytree.tree_unflatten([_copied(leaf) for leaf in self._leaves], self._spec)
        with apart(), ThroughPyTorch():
            self.model(*args, **kwargs)

    def disagreement(self, got: Sequence[Tensor]) -> str:
        """How results differ from the model's by more than rounding may; "" if they do not."""
        tensors = iter(got)
        results = [next(tensors) if isinstance(result, Tensor) else result for result in self._expected]
        with apart():
            return _differs(self.program, results, _Check(self._leaves, self._expected), self.run)


class _Check(NamedTuple):
    """Arguments, flat, and what the model gives for them."""

    leaves: Sequence[Any]
    expected: list[Any]


class _Checks(NamedTuple):
    """A copy of the model, the structure of its arguments, and some of them with its answers."""

    model: nn.Module
    spec: TreeSpec
    known: list[_Check]

    def all(self) -> Iterator[_Check]:
        """The second has other numbers: zeros would hide most defects, and a model may count its calls."""
        first = self.known[0]
        yield first
        if len(self.known) < 2:
            others = [shaken(leaf) for leaf in first.leaves]
            self.known.append(_Check(others, _expected(self.model, others, self.spec)))
        yield self.known[1]


def _built(frozen: nn.Module, checks: _Checks, store: Store, how: How) -> PreparedNetwork | str:
    leaves, expected = checks.known[0]
    try:
        graph, result_spec = _captured(frozen, leaves, checks.spec)
    except CaptureError as error:
        return f"the model cannot be captured: {error}"
    except Exception as error:
        return f"capturing it failed ({first_line(error)})"
    try:
        rewrite(graph, store, how.precision)
        network = PreparedNetwork(graph, store, expected, result_spec, how.tune)
        return next(filter(None, (_disagreement(network, checks, pair) for pair in checks.all())), network)
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


def _unseen(results: Sequence[Any]) -> str:
    """Why these leaves of a model's result cannot be given again; "" if they can."""
    kind = first_unseen(results)
    return f"it returns a {kind}, into which PyTorch does not look for tensors" if kind else ""


def _disagreement(network: PreparedNetwork, checks: _Checks, check: _Check) -> str:
    tensors = network.run([as_captured(leaf) for leaf in check.leaves if isinstance(leaf, Tensor)])
    return _differs(network.program, network.leaves(tensors), check, partial(_expected, checks.model, spec=checks.spec))


def _differs(program: Program, got: Sequence[Any], check: _Check, run: Callable[[Sequence[Any]], list[Any]]) -> str:
    (leaves, expected), usual, step = check, agreement(program.numbers), program.last_step
    if not disagreement(got, expected, usual, step):
        return ""
    # Some networks multiply rounding errors: this one is asked only where it has to be.
    moved = [rounded(leaf) for leaf in leaves]
    precision = precision_of(program.numbers)
    if precision == FLOAT32:
        return disagreement(got, expected, tolerance(usual, run(moved), expected))
    # A mean of bytes often lies between two steps, and by chance no nudge moves it: several are tried.
    mode, ways = (InBfloat16(), 1) if precision == BFLOAT16 else (Nudged(), NUDGES)
    with mode:
        allowed = tolerance_of_few_bits(usual, [run(given) for given in [leaves, moved] * ways], expected)
    return disagreement(got, expected, allowed, step)


def _copied(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


@contextmanager
def apart() -> Iterator[None]:
    """Whatever mode the caller is in; nor are the caller's random numbers drawn."""
    random = torch.random.fork_rng(devices=[])
    with random, torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
        yield
