"""What a normal convolution may become, one file a form: the mathematics of its weights, its fit to images, its layers.

- separable: a depthwise layer with M filters a channel, then a pointwise layer. Its rank is M.
- bottleneck: a pointwise layer to R channels, a depthwise layer with one filter each, a pointwise layer. Its rank is R.
"""

from typing import Any

from sepconv.convert.forms.bottleneck import BottleneckForm
from sepconv.convert.forms.form import Form as Form
from sepconv.convert.forms.separable import SeparableForm

AnyForm = Form[Any]
"""A form whose factors only itself looks into."""

FORMS: dict[str, AnyForm] = {form.name: form for form in (SeparableForm(), BottleneckForm())}
