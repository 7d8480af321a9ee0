"""Depthwise separable convolution for PyTorch: fast layers, and a converter from normal CNNs to separable ones."""

from sepconv.system import interrupt as _interrupt  # noqa: F401  # first: the other imports take seconds

# isort: split
from importlib import import_module as _import_module
from typing import Any as _Any

from sepconv import models as models
from sepconv import reference as reference
from sepconv.compile import compile as compile
from sepconv.convert import convert as convert
from sepconv.cost import count as count
from sepconv.device import export_c as export_c
from sepconv.layers import DepthwiseConv1d as DepthwiseConv1d
from sepconv.layers import DepthwiseConv2d as DepthwiseConv2d
from sepconv.layers import DepthwiseConv3d as DepthwiseConv3d
from sepconv.layers import PointwiseConv1d as PointwiseConv1d
from sepconv.layers import PointwiseConv2d as PointwiseConv2d
from sepconv.layers import PointwiseConv3d as PointwiseConv3d
from sepconv.layers import SeparableConv1d as SeparableConv1d
from sepconv.layers import SeparableConv2d as SeparableConv2d
from sepconv.layers import SeparableConv3d as SeparableConv3d
from sepconv.layers import replace_layers as replace_layers
from sepconv.layers import restore_layers as restore_layers
from sepconv.ops import depthwise_conv1d as depthwise_conv1d
from sepconv.ops import depthwise_conv2d as depthwise_conv2d
from sepconv.ops import depthwise_conv3d as depthwise_conv3d
from sepconv.ops import pointwise_conv1d as pointwise_conv1d
from sepconv.ops import pointwise_conv2d as pointwise_conv2d
from sepconv.ops import pointwise_conv3d as pointwise_conv3d
from sepconv.ops import separable_conv1d as separable_conv1d
from sepconv.ops import separable_conv2d as separable_conv2d
from sepconv.ops import separable_conv3d as separable_conv3d
from sepconv.ops.explain import explain as explain
from sepconv.quantize import quantize as quantize
from sepconv.system.doctor import doctor as doctor

__version__ = "0.1.0.dev0"


def __getattr__(name: str) -> _Any:
    """The other modules that the guides name, whose dependencies take a second to import."""
    if name in ("data", "train"):
        return _import_module(f"sepconv.{name}")
    raise AttributeError(f"module 'sepconv' has no attribute {name!r}")
