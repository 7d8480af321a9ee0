"""Runtimes that compute in integers, each by the tool that belongs to it, from the same calibration images.

OpenVINO by NNCF, ONNX Runtime by its own quantisation (QDQ, weights per channel), ExecuTorch by PT2E for XNNPACK.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sepconv.bench.peers.pytorch_short import quantized_by_pt2e
from sepconv.bench.peers.runtimes import (
    ONNXRUNTIME,
    OPENVINO,
    onnx,
    quietly,
    run_executorch,
    run_onnxruntime,
    run_openvino,
    write_executorch,
)
from sepconv.bench.peers.source import Contender, Network


def _openvino(source: Network, x: Tensor, threads: int) -> Callable[[], Any]:
    """What is left in float32 is computed as OpenVINO likes, in bfloat16 where that is fast."""
    path = source.file("-int8.xml", lambda path: quietly(_write_openvino, source, path))
    return run_openvino(path, "", x, threads)


def _write_openvino(source: Network, path: Path) -> None:
    os.environ.setdefault("NNCF_CI", "1")  # it would report home
    import nncf
    import openvino

    images = [batch[i : i + 1].numpy() for batch in source.calibration() for i in range(len(batch))]
    nncf.set_log_level(40)
    model = openvino.Core().read_model(onnx(source))
    openvino.save_model(nncf.quantize(model, nncf.Dataset(images), subset_size=len(images)), path)


def _onnxruntime(source: Network, x: Tensor, threads: int) -> Callable[[], Any]:
    path = source.file("-int8.onnx", lambda path: quietly(_write_onnx, source, path))
    return run_onnxruntime(path, x, threads)


def _write_onnx(source: Network, path: Path) -> None:
    """Unsigned activations and signed weights, as its documents advise for x86; 7 bits where sums could overflow."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc, unused-ignore]
        def __init__(self) -> None:
            self.batches: Iterator[Tensor] = iter(source.calibration())

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"images": batch.numpy()}

    prepared = path.with_name(f"{path.stem}-prepared.onnx")
    quant_pre_process(str(onnx(source)), str(prepared), skip_symbolic_shape=True)
    quantize_static(
        prepared,
        path,
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        reduce_range=not torch.cpu._is_vnni_supported(),
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )


def _executorch(source: Network, x: Tensor, threads: int) -> Callable[[], Any]:
    path = source.file(f"-int8-{len(x)}.pte", lambda path: quietly(_write_executorch, source, x, path))
    return run_executorch(path, x, threads)


def _write_executorch(source: Network, x: Tensor, path: Path) -> None:
    from executorch.backends.xnnpack.quantizer import xnnpack_quantizer as xnnpack

    config = xnnpack.get_symmetric_quantization_config(is_per_channel=True)
    converted = quantized_by_pt2e(source, xnnpack.XNNPACKQuantizer().set_global(config), x)
    with torch.inference_mode(False), torch.no_grad():
        write_executorch(converted, x, path)


_MODULE = "executorch.extension.pybindings.portable_lib"

CONTENDERS = (
    Contender("openvino", (*OPENVINO, "nncf"), ("openvino",), "nchw", _openvino, precision="int8"),
    Contender("onnxruntime", ONNXRUNTIME, ("onnxruntime",), "nchw", _onnxruntime, precision="int8"),
    Contender("executorch", ("executorch", "torchao"), (_MODULE,), "nchw", _executorch, precision="int8"),
)
