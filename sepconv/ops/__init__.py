"""One call of one operation: from the arguments of a public function to the kernel that computes it."""

from sepconv.ops import flops as flops
from sepconv.ops import postpone as postpone
from sepconv.ops.functions import depthwise_conv1d as depthwise_conv1d
from sepconv.ops.functions import depthwise_conv2d as depthwise_conv2d
from sepconv.ops.functions import depthwise_conv3d as depthwise_conv3d
from sepconv.ops.functions import pointwise_conv1d as pointwise_conv1d
from sepconv.ops.functions import pointwise_conv2d as pointwise_conv2d
from sepconv.ops.functions import pointwise_conv3d as pointwise_conv3d
from sepconv.ops.functions import separable_conv1d as separable_conv1d
from sepconv.ops.functions import separable_conv2d as separable_conv2d
from sepconv.ops.functions import separable_conv3d as separable_conv3d
