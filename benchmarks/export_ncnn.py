"""Instructions of ncnn on ARM for the layers of a network of ours, counted by qemu.

ncnn is called through its wheel for ARM, which needs a Python for ARM: that comes from Debian's archive, is unpacked
into a folder of its own and runs under qemu as well. ncnn reads its own format: the network's convolutions in their
order with random weights, since instructions do not depend on numbers. It computes in float32 by one thread, as ours.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import torch
from torch import nn

from benchmarks.export_instructions import CALLS, counter
from sepconv.models import MobileNetV1

OTHER = "ncnn"
_PACKAGES = (
    *("python3.11-minimal", "libpython3.11-minimal", "libpython3.11-stdlib", "libc6", "libstdc++6", "libgcc-s1"),
    *("zlib1g", "libexpat1", "libffi8"),
)
_PLATFORMS = [f"--platform=manylinux_2_{version}_aarch64" for version in (28, 24, 17)]
_CPU = "cortex-a72"
"""A Raspberry Pi 4's: without it ncnn would compute in float16."""
_SCRIPT = """
import sys
import ncnn
folder, side, calls = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
net = ncnn.Net()
net.opt.num_threads = 1
for name in ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic", "use_bf16_storage"):
    setattr(net.opt, name, False)
assert net.load_param(folder + "/ncnn.param") == 0
assert net.load_model(folder + "/ncnn.bin") == 0
image = ncnn.Mat(side, side, 3)
image.fill(0.5)
for _ in range(calls):
    extractor = net.create_extractor()
    extractor.input("image", image)
    code, out = extractor.extract("scores")
    assert code == 0 and out.w == int(sys.argv[4])
"""


def missing() -> str:
    """Why nothing can be counted here; "" if it can, so far as is known before anything is fetched."""
    absent = [tool for tool in ("gcc", "qemu-aarch64", "apt-get", "dpkg") if not shutil.which(tool)]
    return f"there is no {absent[0]} here" if absent else ""


def fetched(folder: Path) -> Path:
    """Python and ncnn for ARM below a folder.

    Raises:
        subprocess.CalledProcessError: one of them cannot be fetched or unpacked.
    """
    root, archives = folder / "arm", folder / "archives"
    for place in (root / "site", archives, folder / "lists" / "partial", folder / "cache" / "archives" / "partial"):
        place.mkdir(parents=True, exist_ok=True)
    (folder / "status").touch()
    where = {"State": folder, "State::status": folder / "status", "Cache": folder / "cache"}
    options = [f"-oDir::{key}={place}" for key, place in where.items()]
    apt = ["apt-get", "-qq", "-oAPT::Architecture=arm64", "-oAPT::Architectures=arm64", *options]
    subprocess.run([*apt, "update"], check=True, capture_output=True)
    subprocess.run([*apt, "download", *_PACKAGES], cwd=archives, check=True, capture_output=True)
    for package in archives.glob("*.deb"):
        subprocess.run(["dpkg", "-x", package, root], check=True)
    wheel = ["download", "--no-deps", "--only-binary=:all:", "--python-version=3.11", *_PLATFORMS, "-d", str(archives)]
    subprocess.run([sys.executable, "-m", "pip", "-q", *wheel, OTHER], check=True, capture_output=True)
    for file in archives.glob("*.whl"):
        with zipfile.ZipFile(file) as content:
            content.extractall(root / "site")
    return root


def write_model(model: nn.Module, folder: Path) -> int:
    """The network in ncnn's format: convolutions with ReLU6, a mean and a linear layer; returns the number of outputs.

    Raises:
        ValueError: it is another network.
    """
    if not isinstance(model, MobileNetV1):
        raise ValueError(f"only MobileNet v1 is written in ncnn's format here, not {type(model).__name__}")
    layers, weights, last = ["Input image 0 1 image"], bytearray(), "image"
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    [linear] = [module for module in model.modules() if isinstance(module, nn.Linear)]
    for number, conv in enumerate(convolutions):
        kind = "Convolution" if conv.groups == 1 else "ConvolutionDepthWise"
        sizes = f"0={conv.out_channels} 1={conv.kernel_size[0]} 3={conv.stride[0]} 4={conv.padding[0]} 5=1"
        group = "" if conv.groups == 1 else f" 7={conv.groups}"
        clip = f"6={conv.weight.numel()}{group} 9=3 -23310=2,0.0,6.0"
        layers.append(f"{kind} conv{number} 1 1 {last} c{number} {sizes} {clip}")
        weights += _floats(conv.weight.numel(), marked=True) + _floats(conv.out_channels)
        last = f"c{number}"
    layers.append(f"Pooling mean 1 1 {last} mean 0=1 4=1")
    layers.append(f"InnerProduct linear 1 1 mean scores 0={linear.out_features} 1=1 2={linear.weight.numel()}")
    weights += _floats(linear.weight.numel(), marked=True) + _floats(linear.out_features)
    (folder / "ncnn.param").write_text("\n".join(["7767517", f"{len(layers)} {len(layers)}", *layers, ""]))
    (folder / "ncnn.bin").write_bytes(weights)
    return linear.out_features


def _floats(count: int, marked: bool = False) -> bytes:
    """``marked``: four bytes before them say that they are of 32 bits."""
    return bytes(4 * marked) + (torch.rand(count) / 10 - 0.05).numpy().tobytes()


def counted(model: nn.Module, side: int, folder: Path) -> int:
    """Instructions of one call for one image.

    Raises:
        ValueError: ncnn's format is not written for such a network.
        subprocess.CalledProcessError: something cannot be fetched or does not run.
    """
    outputs, root, plugin = write_model(model, folder), fetched(folder), counter(folder)
    (folder / "call.py").write_text(_SCRIPT)
    file, python = folder / "count.txt", root / "usr" / "bin" / "python3.11"
    given = {"PYTHONHOME": root / "usr", "PYTHONPATH": root / "site", "OMP_NUM_THREADS": 1}
    machine = ["qemu-aarch64", "-cpu", _CPU, "-plugin", str(plugin), "-L", str(root)]
    machine += [part for key, value in given.items() for part in ("-E", f"{key}={value}")]
    found = []
    for calls in (1, 1 + CALLS):
        run = [str(python), "-S", str(folder / "call.py"), str(folder), str(side), str(calls), str(outputs)]
        subprocess.run([*machine, *run], check=True, env={**os.environ, "COUNT_FILE": str(file)}, capture_output=True)
        found.append(int(file.read_text()))
    return (found[1] - found[0]) // CALLS
