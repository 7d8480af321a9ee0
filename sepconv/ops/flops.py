"""What PyTorch's ``FlopCounterMode`` counts for our operators: what it counts for its own convolutions.

So PyTorch's own formulas are asked, whatever their version says. (That of 2.13 leaves groups out of the gradient of
filters, for grouped ``nn.Conv`` and so for ours.) What is computed twice counts twice: in training a fused separable
convolution filters again in its backward pass, and sums to a bias are products with ones.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
from typing import Any

import torch

from sepconv.ops import schema as _operators  # noqa: F401  (registers the operations that are named here)

_COUNTER = "torch.utils.flop_counter"
_aten = torch.ops.aten

Shape = Sequence[int]


def _formula(operator: Any) -> Callable[..., int]:
    """PyTorch's, of shapes."""
    found: Callable[..., int] = sys.modules[_COUNTER].flop_registry[operator]
    return found


def _conv(x: Shape, weight: Shape, out: Shape, groups: int) -> int:
    options = (None, [1], [0], [1], False, [0], groups)
    return _formula(_aten.convolution)(x, weight, *options, out_val=out)


def _conv_backward(grad: Shape, x: Shape, weight: Shape, wanted: tuple[bool, bool, bool]) -> int:
    options = (None, [1], [0], [1], False, [0], x[1], wanted)
    results = tuple(shape if want else None for shape, want in zip((x, weight, None), wanted, strict=True))
    return _formula(_aten.convolution_backward)(grad, x, weight, *options, out_val=results)


def _depthwise(x: Shape, weight: Shape, *options: Any, out_shape: Shape) -> int:
    return _conv(x, weight, out_shape, x[1])


def _grad_input(grad: Shape, weight: Shape, size: Shape, *geometry: Any, out_shape: Shape) -> int:
    return _conv_backward(grad, size, weight, (True, False, False))


def _grad_weight(grad: Shape, x: Shape, size: Shape, *geometry: Any, out_shape: Shape) -> int:
    return _conv_backward(grad, x, size, (False, True, False))


def _pointwise(x: Shape, weight: Shape, *options: Any, out_shape: Shape) -> int:
    return _conv(x, weight, out_shape, 1)


def _separable(x: Shape, depthwise: Shape, pointwise: Shape, *options: Any, out_shape: Shape) -> int:
    hidden = (x[0], depthwise[0], *out_shape[2:])
    return _conv(x, depthwise, hidden, x[1]) + _conv(hidden, pointwise, out_shape, 1)


_FORMULAS: dict[str, Callable[..., int]] = {
    "depthwise_conv": _depthwise,
    "depthwise_conv_grad_input": _grad_input,
    "depthwise_conv_grad_weight": _grad_weight,
    "pointwise_conv": _pointwise,
    "separable_conv": _separable,
}


def _register() -> None:
    for name, formula in _FORMULAS.items():
        sys.modules[_COUNTER].register_flop_formula(getattr(torch.ops.sepconv, name))(formula)


class _WhenImported(MetaPathFinder):
    """Registers the formulas when somebody imports the counter: if we did, ``import sepconv`` would import Triton."""

    def find_spec(self, name: str, *_: Any) -> Any:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        assert spec is not None
        loader: Any = spec.loader
        run = loader.exec_module

        def run_and_register(module: Any) -> None:
            run(module)
            _register()

        loader.exec_module = run_and_register
        return spec


if _COUNTER in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _WhenImported())
