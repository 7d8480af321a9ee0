"""The layers: depthwise, pointwise and separable convolution as ``torch.nn`` modules."""

from sepconv.layers.conv import DepthwiseConv1d as DepthwiseConv1d
from sepconv.layers.conv import DepthwiseConv2d as DepthwiseConv2d
from sepconv.layers.conv import DepthwiseConv3d as DepthwiseConv3d
from sepconv.layers.conv import PointwiseConv1d as PointwiseConv1d
from sepconv.layers.conv import PointwiseConv2d as PointwiseConv2d
from sepconv.layers.conv import PointwiseConv3d as PointwiseConv3d
from sepconv.layers.replace import replace_layers as replace_layers
from sepconv.layers.replace import restore_layers as restore_layers
from sepconv.layers.separable import SeparableConv1d as SeparableConv1d
from sepconv.layers.separable import SeparableConv2d as SeparableConv2d
from sepconv.layers.separable import SeparableConv3d as SeparableConv3d
