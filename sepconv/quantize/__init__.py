"""Trained networks that compute with 8-bit integers, without labels and without training; a file each step.

``capture`` and ``layers`` make a graph of any model, ``equalize`` and ``rounding`` change its weights, ``placement``
and ``fake`` mark what is integers, ``sweep`` does it all in one passage.
"""

from sepconv.quantize.plan import QuantizationPlan as QuantizationPlan
from sepconv.quantize.plan import QuantizedLayer as QuantizedLayer
from sepconv.quantize.plan import QuantizedValue as QuantizedValue
from sepconv.quantize.quantization import quantize as quantize
from sepconv.quantize.saving import is_quantized as is_quantized
