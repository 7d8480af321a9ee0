"""Converting trained normal networks into depthwise separable ones, without labels and without training."""

from sepconv.convert.network import closed_form as closed_form
from sepconv.convert.network import convert as convert
from sepconv.convert.plan import LayerPlan as LayerPlan
from sepconv.convert.plan import Plan as Plan
