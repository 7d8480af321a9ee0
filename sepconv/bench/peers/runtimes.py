"""Contenders that read the network from a file: ONNX Runtime, OpenVINO, ncnn, MNN and ExecuTorch with XNNPACK.

Each computes with as many threads as asked for, on images that it reads where they lie as far as its interface allows;
all but OpenVINO in float32. No thread pool may be left spinning, for it would take the cores from the next contender.
"""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sepconv.bench.peers.source import Contender, Network
from sepconv.runs.onnx_file import export_onnx


def onnx(source: Network) -> Path:
    """The network as an ONNX file."""
    return source.file(".onnx", lambda path: quietly(export_onnx, source.model, (3, source.side, source.side), path))


def quietly(function: Callable[..., Any], *args: Any) -> None:
    """Converters warn of deprecations in the packages that they use."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        function(*args)


def _converter(*command: str, cwd: Path) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise ValueError(f"bench network: {Path(command[0]).name} failed with {done.returncode}: {''.join(last)}")


def _onnxruntime(source: Network, x: Tensor, threads: int) -> Callable[[], Any]:
    return run_onnxruntime(onnx(source), x, threads)


def run_onnxruntime(path: Path, x: Tensor, threads: int) -> Callable[[], Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    # Its workers may spin while a call runs, which makes calls faster, but not afterwards.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    binding.bind_ortvalue_input(session.get_inputs()[0].name, onnxruntime.OrtValue.ortvalue_from_numpy(x.numpy()))
    binding.bind_output(session.get_outputs()[0].name)

    def run() -> Any:
        session.run_with_iobinding(binding)
        return binding.get_outputs()[0].numpy()

    return run


def _openvino(hint: str, source: Network, x: Tensor, threads: int) -> Callable[[], Any]:
    return run_openvino(onnx(source), hint, x, threads)


def run_openvino(path: Path, hint: str, x: Tensor, threads: int) -> Callable[[], Any]:
    """``hint``: in which precision it computes; "" leaves that to it."""
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    model.reshape(list(x.shape))
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        # It would tie the calling thread to a core.
        "ENABLE_CPU_PINNING": False,
    }
    if hint:
        settings["INFERENCE_PRECISION_HINT"] = hint
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    request.set_input_tensor(openvino.Tensor(x.numpy(), shared_memory=True))

    def run() -> Any:
        request.infer()
        return request.get_output_tensor().data

    return run


def _ncnn(source: Network, x: Tensor, threads: int) -> Callable[[], Any]:
    """It computes one image at a time."""
    import ncnn

    param = source.file(".ncnn.param", lambda path: _write_ncnn(source, path))
    net = ncnn.Net()
    net.opt.num_threads = threads
    for name in ("fp16_packed", "fp16_storage", "fp16_arithmetic", "bf16_storage"):
        setattr(net.opt, f"use_{name}", False)
    if net.load_param(str(param)) or net.load_model(str(param.with_suffix(".bin"))):
        raise ValueError(f"bench network: ncnn cannot read {param.name}")
    first, last = net.input_names()[0], net.output_names()[0]
    images = [ncnn.Mat(image) for image in x.numpy()]

    def run() -> Any:
        scores = []
        for image in images:
            extractor = net.create_extractor()
            extractor.input(first, image)
            scores.append(np.array(extractor.extract(last)[1]))
        return np.stack(scores)

    return run


def _write_ncnn(source: Network, path: Path) -> None:
    import pnnx

    traced = path.with_name(f"{source.name}.pt")
    quietly(lambda: torch.jit.trace(source.model, source.images(1)).save(traced))
    size = f"inputshape=[1,3,{source.side},{source.side}]"
    files = (f"ncnnparam={path.name}", f"ncnnbin={path.with_suffix('.bin').name}")
    _converter(str(pnnx.EXEC_PATH), traced.name, size, "fp16=0", *files, cwd=path.parent)


def _mnn(source: Network, x: Tensor, threads: int) -> Callable[[], Any]:
    import MNN.expr
    import MNN.nn

    path = source.file(".mnn", lambda path: _write_mnn(onnx(source), path))
    settings = ({"backend": "CPU", "precision": "high", "numThread": threads},)
    manager = MNN.nn.create_runtime_manager(settings)
    module = MNN.nn.load_module_from_file(str(path), ["images"], ["scores"], runtime_manager=manager)
    images = MNN.expr.placeholder(list(x.shape), MNN.expr.NCHW)
    return _Written(lambda: images.write(x.numpy()), lambda: module.forward([images])[0].read())


class _Written:
    """A call of what has images of its own, into which those that are measured with are written once."""

    def __init__(self, reload: Callable[[], Any], call: Callable[[], Any]) -> None:
        self.reload, self._call = reload, call
        reload()

    def __call__(self) -> Any:
        return self._call()


def _write_mnn(onnx: Path, path: Path) -> None:
    # Its command line wants to report home; the function behind it does not.
    call = "import sys, _tools; _tools.mnnconvert(sys.argv)"
    names = ("-f", "ONNX", "--modelFile", onnx.name, "--MNNModel", path.name)
    _converter(sys.executable, "-c", call, *names, cwd=path.parent)


def _executorch(source: Network, x: Tensor, threads: int) -> Callable[[], Any]:
    def write(path: Path) -> None:
        write_executorch(source.model, x, path)

    return run_executorch(source.file(f"-{len(x)}.pte", lambda path: quietly(write, path)), x, threads)


def run_executorch(path: Path, x: Tensor, threads: int) -> Callable[[], Any]:
    from executorch.extension.pybindings import portable_lib

    portable_lib._unsafe_reset_threadpool(threads)
    module = portable_lib._load_for_executorch(str(path))
    return lambda: module.forward((x,))[0]


def write_executorch(model: nn.Module, x: Tensor, path: Path) -> None:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    program = torch.export.export(model, (x,))
    path.write_bytes(to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch().buffer)


ONNXRUNTIME, OPENVINO = ("onnxruntime", "onnx", "onnxscript"), ("openvino", "onnx", "onnxscript")

CONTENDERS = (
    Contender("onnxruntime", ONNXRUNTIME, ("onnxruntime",), "nchw", _onnxruntime),
    Contender("openvino", OPENVINO, ("openvino",), "nchw", partial(_openvino, "f32")),
    Contender("openvino", OPENVINO, ("openvino",), "nchw", partial(_openvino, "bf16"), precision="bfloat16"),
    # As its users get it: in bfloat16 where the processor has products of that.
    Contender("openvino-default", OPENVINO, ("openvino",), "nchw", partial(_openvino, ""), precision="bfloat16"),
    Contender("ncnn", ("ncnn", "pnnx"), ("ncnn",), "nchw", _ncnn),
    Contender("mnn", ("MNN", "onnx", "onnxscript"), ("MNN.nn", "MNN.expr"), "nchw", _mnn),
    Contender("executorch", ("executorch",), ("executorch.extension.pybindings.portable_lib",), "nchw", _executorch),
)
