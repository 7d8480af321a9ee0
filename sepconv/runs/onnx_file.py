"""Trained networks for other runtimes: ONNX files of plain Conv nodes, checked before they get their name."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sepconv.layers.borrowed import because_of_weights, copied, evaluating
from sepconv.leaves import Inputs, leaves
from sepconv.leaves.complaint import complaint
from sepconv.quantize import is_quantized
from sepconv.runs import qdq
from sepconv.system.files import replacing

TOLERANCE = 1e-4
"""Largest error allowed between ONNX Runtime and PyTorch, relative to the largest output."""

QUANTIZED_TOLERANCE = 1e-3
"""The same of a quantized network, where a number between two steps may come out as the other one: the squared error
of all its outputs, relative to their squares."""

CHECK_BATCHES = (1, 3)


@dataclass(frozen=True)
class Exported:
    """An ONNX file that was written.

    Attributes:
        path: where it lies.
        size: in bytes.
        convolutions: Conv nodes in it.
        max_error: largest absolute difference to PyTorch's outputs; None if it was not compared.
        checked_with: the runtime that was compared and its version; empty if none is installed.
    """

    path: Path
    size: int
    convolutions: int
    max_error: float | None
    checked_with: str


def missing() -> str:
    """Why ONNX files cannot be written here, in a sentence; the empty string if they can."""
    absent = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if absent:
        return f"ONNX export needs {' and '.join(absent)}: pip install 'sepconv[onnx]'"
    return ""


def export_onnx(model: nn.Module, input_shape: Sequence[int] | Inputs, path: str | Path) -> Exported:
    """Write `model` in evaluation mode as an ONNX file with a batch of any size.

    Separable layers become two Conv nodes, so any runtime reads the file. A quantized network has int8 weights and
    pairs of QuantizeLinear and DequantizeLinear there. Where ONNX Runtime is installed, the file is run on random
    batches of 1 and 3 and compared with PyTorch before it gets its name.

    Args:
        model: with inputs and outputs of any structure that PyTorch exports; left as it was.
        input_shape: of the only input without the batch, (C, H, W); or an example of all inputs.
        path: of the file; an existing one is replaced.

    Raises:
        ModuleNotFoundError: the extra `sepconv[onnx]` is needed.
        ValueError: the model cannot be exported, has weights that are no numbers, or ONNX Runtime's outputs differ.
        OSError: the file cannot be written.
    """
    path = Path(path)
    if reason := missing():
        raise ModuleNotFoundError(f"export_onnx: {reason}")
    frozen = copied(model, "export_onnx").cpu()
    example = input_shape if isinstance(input_shape, Inputs) else Inputs((torch.zeros(2, *input_shape),))
    example = _of_batch(example, 2)
    with evaluating(frozen):
        proto = _to_proto(frozen, example)
    foreign = sorted({f"{node.domain}.{node.op_type}" for node in proto.graph.node if node.domain})
    if foreign:
        raise ValueError(f"export_onnx: operators outside the ONNX standard: {', '.join(foreign)}")
    content = proto.SerializeToString()
    with evaluating(frozen):
        checked_with, max_error = _check(frozen, content, example)
    with replacing(path) as file:
        file.write(content)
    convolutions = sum(node.op_type == "Conv" for node in proto.graph.node)
    return Exported(path, len(content), convolutions, max_error, checked_with)


def _of_batch(example: Inputs, samples: int) -> Inputs:
    """As many samples as that, the first ones again where there are fewer."""
    count = len(example)
    return example if count == samples or not count else example[torch.arange(samples) % count]


def _names(model: nn.Module, example: Inputs) -> tuple[list[str], list[str]]:
    """Of inputs and outputs in the file; no names of outputs where some are no fractions."""
    try:
        with torch.no_grad():
            output = example.run(model)
    except Exception as error:  # any code of the model may fail, in any way
        reason = complaint(error)
        raise ValueError(f"export_onnx: the model does not take inputs of shape {example}: {reason}") from error
    found = leaves(output)
    finite = all(bool(leaf.isfinite().all()) for leaf in found.values())
    if not finite and (why := because_of_weights(model)):
        raise ValueError(f"export_onnx: the outputs of the model hold NaN or infinity{why}")
    inputs = list(example.kwargs) or [f"input_{i}" for i in range(len(example.args))]
    if example.tensor is not None and example.tensor.dim() == 4:
        inputs = ["images"]
    outputs = [name.replace(".", "_") or ("scores" if leaf.dim() == 2 else "output") for name, leaf in found.items()]
    return inputs, outputs if len(found) == len(_tensors(output)) else []


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def _to_proto(model: nn.Module, example: Inputs) -> Any:
    inputs, outputs = _names(model, example)
    if len(inputs) != len(example.tensors):
        raise ValueError("export_onnx: every argument of the model must be a tensor")
    batch = {0: torch.export.Dim("batch")}
    sizes: Any = dict.fromkeys(example.kwargs, batch) if example.kwargs else (batch,) * len(example.args)
    with _quiet():
        try:
            program = torch.onnx.export(
                model,
                example.args,
                kwargs=example.kwargs or None,
                dynamo=True,
                input_names=inputs,
                output_names=outputs or None,
                dynamic_shapes=sizes,
                custom_translation_table=qdq.translations() if is_quantized(model) else None,
                verbose=False,
            )
        except Exception as error:
            reason = str(error.__cause__ or error).strip().splitlines()
            raise ValueError(
                f"export_onnx: PyTorch cannot export {type(model).__name__} "
                f"({reason[0] if reason else type(error).__name__})"
            ) from error
    assert program is not None
    proto = program.model_proto
    if is_quantized(model):
        qdq.store_integers(proto)
    return proto


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's announcements and its dependencies' deprecations away from the user."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _random(example: Tensor, generator: torch.Generator) -> Tensor:
    """Numbers of a normal distribution in the place of fractions; others, such as indices, as they are."""
    return torch.randn(example.shape, generator=generator) if example.is_floating_point() else example


@torch.inference_mode()
def _check(model: nn.Module, content: bytes, example: Inputs) -> tuple[str, float | None]:
    """Name of the runtime and its largest absolute error; ("", None) where none is installed."""
    if find_spec("onnxruntime") is None:
        return "", None
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    if is_quantized(model):  # as the file says: what it makes of it saturates at 16 bits where there is no VNNI
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    random = torch.Generator().manual_seed(0)
    worst = 0.0
    for batch in CHECK_BATCHES:
        x = _of_batch(example, batch).map(partial(_random, generator=random))
        names = [entry.name for entry in session.get_inputs()]
        given = {name: tensor.numpy() for name, tensor in zip(names, x.tensors, strict=True)}
        for want, have in zip(_tensors(x.run(model)), session.run(None, given), strict=True):
            difference = torch.from_numpy(have) - want
            error = float(difference.abs().max())
            limit = TOLERANCE * float(want.abs().max().clamp_min(1))
            if is_quantized(model):
                close = bool(difference.square().sum() <= QUANTIZED_TOLERANCE * want.square().sum())
            else:
                close = error <= limit
            if not close:
                raise ValueError(
                    f"export_onnx: ONNX Runtime's outputs differ from PyTorch's by {error:.2g}, more than {limit:.2g}"
                )
            worst = max(worst, error)
    return f"onnxruntime {onnxruntime.__version__}", worst
