"""Models to train, convert and measure, by class or by name."""

from sepconv.models.mobilenet_v1 import MobileNetV1 as MobileNetV1
from sepconv.models.mobilenet_v1 import MobileNetV1Normal as MobileNetV1Normal
from sepconv.models.mobilenet_v2 import InvertedResidual as InvertedResidual
from sepconv.models.mobilenet_v2 import MobileNetV2 as MobileNetV2
from sepconv.models.quick import QuickNet as QuickNet
from sepconv.models.registry import BUILT_IN as BUILT_IN
from sepconv.models.registry import create as create
from sepconv.models.resnet import ResNet as ResNet
from sepconv.models.vgg import VGGSmall as VGGSmall
from sepconv.models.weights import from_huggingface as from_huggingface
from sepconv.models.weights import load_weights as load_weights
