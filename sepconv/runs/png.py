"""Small pictures as PNG data: what a report embeds."""

from __future__ import annotations

import base64
import io

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F


def encode(pixels: Tensor) -> bytes:
    """Eight-bit pixels as the bytes of a PNG file.

    Shape:
        pixels: uint8 (1, H, W) grey or (3, H, W) colour

    Raises:
        ValueError: another shape or dtype.

    Example:
        >>> encode(torch.zeros(1, 2, 2, dtype=torch.uint8))[:4]
        b'\\x89PNG'
    """
    if pixels.dtype != torch.uint8 or pixels.dim() != 3 or pixels.shape[0] not in (1, 3) or pixels.numel() == 0:
        raise ValueError(
            f"encode: pixels must be uint8 of shape (1, H, W) or (3, H, W), got {pixels.dtype} {tuple(pixels.shape)}"
        )
    rows, file = pixels.permute(1, 2, 0).cpu().numpy(), io.BytesIO()
    Image.fromarray(rows[..., 0] if rows.shape[2] == 1 else rows).save(file, "PNG", optimize=True)
    return file.getvalue()


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
