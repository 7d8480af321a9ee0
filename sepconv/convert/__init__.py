"""Converting trained normal networks into depthwise separable ones, without labels and without training.

``images``, ``passes`` and ``moments`` know nothing of what a convolution becomes: they serve whoever fits layers to
what these see.
"""

from sepconv.convert.conversion import closed_form as closed_form
from sepconv.convert.conversion import convert as convert
from sepconv.convert.plan import LayerPlan as LayerPlan
from sepconv.convert.plan import Plan as Plan
