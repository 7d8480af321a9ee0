"""Small pictures as PNG data, without an imaging package: what a report embeds."""

from __future__ import annotations

import base64
import struct
import zlib

import torch
from torch import Tensor
from torch.nn import functional as F

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_GREY, _RGB = 0, 2


def encode(pixels: Tensor) -> bytes:
    """Eight-bit pixels as the bytes of a PNG file.

    Shape:
        pixels: uint8 (1, H, W) grey or (3, H, W) colour

    Raises:
        ValueError: another shape or dtype.

    Example:
        >>> encode(torch.zeros(1, 2, 2, dtype=torch.uint8))[:4]
        b'\\x89PNG'

    Reference: W3C Portable Network Graphics specification, sections 5 and 11.
    """
    if pixels.dtype != torch.uint8 or pixels.dim() != 3 or pixels.shape[0] not in (1, 3) or pixels.numel() == 0:
        raise ValueError(
            f"encode: pixels must be uint8 of shape (1, H, W) or (3, H, W), got {pixels.dtype} {tuple(pixels.shape)}"
        )
    channels, height, width = pixels.shape
    rows = pixels.permute(1, 2, 0).reshape(height, width * channels).cpu()
    # Every row starts with the number of its prediction filter; 0 is none.
    unfiltered = torch.cat([torch.zeros(height, 1, dtype=torch.uint8), rows], dim=1)
    header = struct.pack(">IIBBBBB", width, height, 8, _GREY if channels == 1 else _RGB, 0, 0, 0)
    data = zlib.compress(unfiltered.numpy().tobytes(), 9)
    return _SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")


def data_uri(image: Tensor, limit: int = 224) -> str:
    """An image, normalised or not, as a ``data:`` address that a page can show.

    Values are stretched so that the smallest is black and the largest white. Images of other than one or three channels
    become the grey mean of their channels; images with a side above `limit` are made smaller.

    Shape:
        image: (C, H, W)

    Example:
        >>> data_uri(torch.zeros(3, 8, 8))[:22]
        'data:image/png;base64,'
    """
    if image.dim() != 3 or image.numel() == 0:
        raise ValueError(f"data_uri: image must have shape (C, H, W), got {tuple(image.shape)}")
    values = torch.nan_to_num(image.detach().float().cpu(), posinf=0.0, neginf=0.0)
    if values.shape[0] not in (1, 3):
        values = values.mean(0, keepdim=True)
    side = max(values.shape[1:])
    if side > limit:
        size = [max(1, round(length * limit / side)) for length in values.shape[1:]]
        values = F.interpolate(values[None], size, mode="area")[0]
    low, high = float(values.min()), float(values.max())
    stretched = (values - low) / max(high - low, 1e-12) * 255
    return "data:image/png;base64," + base64.b64encode(encode(stretched.round().to(torch.uint8))).decode()


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
