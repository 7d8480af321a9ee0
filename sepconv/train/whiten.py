"""A first layer that starts as the principal patterns of the training images, which saves the first epochs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FLOOR = 5e-4
"""Added to the variance of every pattern, so that the weakest ones are not scaled up to noise."""


@torch.no_grad()
def whiten_first_layer(model: nn.Module, images: Tensor) -> None:
    """Set the first normal convolution to the whitened principal patterns of `images` and their negatives.

    The filters are the eigenvectors of the patches' covariance, each over the root of its eigenvalue, the strongest
    first; then their negatives, which together with ReLU keep everything; further filters stay as they are.

    Shape:
        images: (N, C, H, W)

    Raises:
        ValueError: the model has no normal convolution of the images' channels.

    Reference: Jordan 2024, arXiv:2404.00498, section 3.1.
    """
    channels = images.shape[1]
    convolutions = (m for m in model.modules() if isinstance(m, nn.Conv2d))
    first = next((m for m in convolutions if m.groups == 1 and m.in_channels == channels), None)
    if first is None:
        raise ValueError(f"train: whitening needs a normal convolution of {channels} channels as the first layer")
    patches = F.unfold(images.double().cpu(), first.kernel_size, first.dilation).transpose(1, 2).flatten(0, 1)
    values, vectors = torch.linalg.eigh(torch.cov(patches.T))
    patterns = (vectors * (values + FLOOR).rsqrt()).T.flip(0)
    filters = torch.cat([patterns, -patterns])[: first.out_channels]
    first.weight[: len(filters)] = filters.view(-1, *first.weight.shape[1:]).to(first.weight)
    if first.bias is not None:
        first.bias.zero_()
