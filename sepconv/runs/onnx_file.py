"""Trained networks for other runtimes: ONNX files of plain Conv nodes, checked before they get their name."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sepconv.layers.borrowed import copied, evaluating
from sepconv.system.files import replacing

TOLERANCE = 1e-4
"""Largest error allowed between ONNX Runtime and PyTorch, relative to the largest output."""

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


def export_onnx(model: nn.Module, input_shape: Sequence[int], path: str | Path) -> Exported:
    """Write `model` in evaluation mode as an ONNX file with a batch of any size.

    Separable layers become two Conv nodes, so any runtime reads the file. Where ONNX Runtime is installed, the file is
    run on random batches of 1 and 3 and compared with PyTorch before it gets its name.

    Args:
        model: takes a tensor (N, C, H, W) and returns a tensor; left as it was.
        input_shape: of one input without the batch, (C, H, W).
        path: of the file; an existing one is replaced.

    Raises:
        ModuleNotFoundError: the extra `sepconv[onnx]` is needed.
        ValueError: the model cannot be exported, or ONNX Runtime's outputs differ.
        OSError: the file cannot be written.
    """
    path = Path(path)
    if reason := missing():
        raise ModuleNotFoundError(f"export_onnx: {reason}")
    frozen = copied(model, "export_onnx").cpu()
    with evaluating(frozen):
        proto = _to_proto(frozen, torch.zeros(2, *input_shape))
    foreign = sorted({f"{node.domain}.{node.op_type}" for node in proto.graph.node if node.domain})
    if foreign:
        raise ValueError(f"export_onnx: operators outside the ONNX standard: {', '.join(foreign)}")
    content = proto.SerializeToString()
    with evaluating(frozen):
        checked_with, max_error = _check(frozen, content, input_shape)
    with replacing(path) as file:
        file.write(content)
    convolutions = sum(node.op_type == "Conv" for node in proto.graph.node)
    return Exported(path, len(content), convolutions, max_error, checked_with)


def _to_proto(model: nn.Module, example: Tensor) -> Any:
    with _quiet():
        try:
            program = torch.onnx.export(
                model,
                (example,),
                dynamo=True,
                input_names=["images"],
                output_names=["scores"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                verbose=False,
            )
        except Exception as error:
            reason = str(error.__cause__ or error).strip().splitlines()
            raise ValueError(
                f"export_onnx: PyTorch cannot export {type(model).__name__} "
                f"({reason[0] if reason else type(error).__name__})"
            ) from error
    assert program is not None
    return program.model_proto


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


@torch.inference_mode()
def _check(model: nn.Module, content: bytes, input_shape: Sequence[int]) -> tuple[str, float | None]:
    """Name of the runtime and its largest absolute error; ("", None) where none is installed."""
    if find_spec("onnxruntime") is None:
        return "", None
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    random = torch.Generator().manual_seed(0)
    worst = 0.0
    for batch in CHECK_BATCHES:
        x = torch.randn(batch, *input_shape, generator=random)
        expected = model(x)
        found = torch.from_numpy(session.run(None, {"images": x.numpy()})[0])
        error = float((found - expected).abs().max())
        limit = TOLERANCE * float(expected.abs().max().clamp_min(1))
        if not error <= limit:
            raise ValueError(
                f"export_onnx: ONNX Runtime's outputs differ from PyTorch's by {error:.2g}, more than {limit:.2g}"
            )
        worst = max(worst, error)
    return f"onnxruntime {onnxruntime.__version__}", worst
