"""Conversions of published networks: ncnn's files are read rightly, tones have their pitch, rivals their best."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.published import documents
from benchmarks.published.__main__ import relative_error
from benchmarks.published.ncnn import NcnnNetwork
from benchmarks.published.networks import pitch_accuracy, tones
from benchmarks.published.rivals import covariances, fitted

PARAM = """7767517
7 8
Input         data     0 1 data 0=9 1=9 2=3
Split         twice    1 2 data a b
Convolution   conv     1 1 a c 0=4 1=3 4=1 5=1 6=108 9=2 -23310=1,0.1
Deconvolution up       1 1 c d 0=3 1=2 3=2 5=1 6=48
Interp        larger   1 1 b e 0=1 1=2.0 2=2.0
BinaryOp      sum      2 1 d e f 0=0
PReLU         end      1 1 f out 0=3
"""


def written(folder: Path, param: str, *parts: Tensor | bytes) -> NcnnNetwork:
    """Numbers as the file has them; bytes as they are."""
    content = b"".join(part if isinstance(part, bytes) else part.float().numpy().tobytes() for part in parts)
    (folder / "a.param").write_text(param)
    (folder / "a.bin").write_bytes(content)
    return NcnnNetwork(folder / "a.param", folder / "a.bin").eval()


def half(values: Tensor) -> bytes:
    """Weights of 16 bits behind their mark, filled up to whole words."""
    content = values.numpy().astype(np.float16).tobytes()
    return np.uint32(0x01306B47).tobytes() + content + bytes(-len(content) % 4)


def test_an_ncnn_network_computes_what_its_layers_say(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(4, 3, 3, 3), torch.randn(4)
    up, up_bias, slope = torch.randn(3, 4, 2, 2).half().float(), torch.randn(3), torch.rand(3)
    model = written(tmp_path, PARAM, bytes(4), weight.flatten(), bias, half(up.flatten()), up_bias, slope)
    x = torch.randn(2, 3, 9, 9)
    hidden = F.leaky_relu(F.conv2d(x, weight, bias, padding=1), 0.1)
    enlarged = F.conv_transpose2d(hidden, up.transpose(0, 1), up_bias, 2) + F.interpolate(x, scale_factor=2)
    torch.testing.assert_close(model(x), F.prelu(enlarged, slope), rtol=1e-5, atol=1e-5)


def test_what_the_reader_does_not_know_it_refuses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ncnn: no layer 'LSTM' here, which strange is"):
        written(tmp_path, "7767517\n2 2\nInput a 0 1 a\nLSTM strange 1 1 a b\n")
    with pytest.raises(ValueError, match=r"ncnn: 4 bytes of .* belong to no layer"):
        written(tmp_path, "7767517\n2 2\nInput a 0 1 a\nPReLU p 1 1 a b 0=3\n", torch.ones(4))
    with pytest.raises(ValueError, match=r"ncnn: .* is no param file"):
        written(tmp_path, "1\n2 2\n")
    wrong = np.uint32(0x000D4B38).tobytes()
    with pytest.raises(ValueError, match="ncnn: weights of kind 0xd4b38 cannot be read"):
        written(tmp_path, "7767517\n2 2\nInput a 0 1 a\nConvolution c 1 1 a b 0=1 1=1 6=3\n", wrong, torch.ones(3))


class Listener(nn.Module):
    """It finds the pitch by the strongest of many sines, and is as sure as can be."""

    def forward(self, frames: Tensor) -> Tensor:
        cents = 1997.3794084376191 + 20 * torch.arange(360)
        hertz = 10 * 2 ** (cents / 1200)
        phase = 2 * torch.pi * hertz[:, None] * torch.arange(frames.shape[1]) / 16_000
        harmonics = torch.stack([(k * phase).cos() + 1j * (k * phase).sin() for k in range(1, 5)])
        strength = torch.einsum("nt,kbt->nkb", frames.to(harmonics.dtype), harmonics).abs().sum(1)
        return F.one_hot(strength.argmax(1), 360).float()


def test_tones_have_the_pitch_that_is_said() -> None:
    frames, hertz = tones(50, seed=3)
    assert frames.shape == (50, 1024)
    assert torch.allclose(frames.std(1), torch.ones(50), atol=1e-4)
    assert 60 <= float(hertz.min()) < float(hertz.max()) <= 1200
    assert pitch_accuracy(Listener()) > 0.5
    assert pitch_accuracy(nn.Linear(1024, 360)) < 0.2


def test_weighted_factors_are_the_best_where_the_images_are() -> None:
    """Of two factors the best are known: those of the weights times the root of the covariance."""
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, bias=False)
    mixed = torch.randn(16, 1, 9, 9) * torch.tensor([1.0, 2.0, 0.0, 0.1]).view(1, 4, 1, 1)
    covariance = covariances(nn.Sequential(conv), ["0"], mixed)["0"]
    weight = conv.weight.detach().double().flatten(2)
    u, s, v = torch.linalg.svd(weight.flatten(1), full_matrices=False)
    start = [u[:, :1] * s[:1], v[:1]]

    def compose(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b).view_as(weight)

    def error(factors: list[Tensor]) -> float:
        rest = (weight - compose(*factors)).flatten(1)
        return float(((rest @ covariance) * rest).sum())

    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp_min(0).sqrt()
    best = float(torch.linalg.svdvals(weight.flatten(1) @ root)[1:].square().sum())
    assert error(start) > 1.1 * best
    assert error(fitted(weight, covariance, start, compose)) == pytest.approx(best, rel=1e-4)


def test_the_error_is_relative_to_the_outputs_variance() -> None:
    class Shifted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 0.5

    inputs = torch.randn(40, 3, 5, 5)
    variance = float(inputs.double().var(correction=0))
    assert relative_error(nn.Identity(), Shifted(), inputs) == pytest.approx(0.25 / variance, rel=1e-5)


def test_a_row_of_the_table() -> None:
    costs = {"conv_params": 800, "macs": 900, "score": 0.5}
    record: dict[str, Any] = {
        "title": "a network", "package": "its package 1.0", "form": "bottleneck", "budget": 0.125, "unit": "dB",
        "original": {**costs, "score": 30.0}, "converted": {"conv_params": 100, "macs": 300, "score": 29.5},
        "relative_error": 0.0123, "core_seconds": 90,
        "ms": {
            "original, torch-nchw": 4.0, "original, torch-nhwc": 3.0, "original, sepconv": 2.0,
            "converted, sepconv": 1.0,
        },
    }  # fmt: skip
    assert documents._row(record, first=True) == [
        "a network (its package 1.0)", "1/8", "bottleneck", "1/8.00", "1/3.00", "30.00 dB", "29.50 dB", "0.012",
        "3.00", "2.00", "1.00", "1.5",
    ]  # fmt: skip
