"""The operators and the public functions, against the float64 reference."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from cases import CASES, Case, arranged
from torch import Tensor

import sepconv
from sepconv import reference
from sepconv.activations import NAMES
from sepconv.kernels.case import Geometry
from sepconv.layers import SeparableConv2d
from sepconv.ops.schema import flat, geometry_of

_DEPTHWISE = {1: sepconv.depthwise_conv1d, 2: sepconv.depthwise_conv2d, 3: sepconv.depthwise_conv3d}
_POINTWISE = {1: sepconv.pointwise_conv1d, 2: sepconv.pointwise_conv2d, 3: sepconv.pointwise_conv3d}
_SEPARABLE = {1: sepconv.separable_conv1d, 2: sepconv.separable_conv2d, 3: sepconv.separable_conv3d}
# The kernels' own tests go through all cases; here it is the way from the function to the kernel that is tested.
_names = ("channels_above_tile", "one_pixel", "padding_larger_than_image", "stride_skips_last_column", "batch_0")
_names += ("dilation_4_stride_2", "even_kernel_same", "multiplier_3_stride_2", "signal_k4", "volume")
_cases = [case for case in CASES if case.name in _names]
_LAYOUTS = {"contiguous": False, "channels_last": True}
_small = [
    case for case in CASES if case.name in ("stride_1_2", "even_kernel_same", "multiplier_2", "signal_k4", "volume")
]


def _view(*shape: int, dtype: torch.dtype = torch.float32, channels_last: bool = False) -> Tensor:
    """Random values in the middle of a larger tensor, so that neither start nor strides are the usual ones."""
    wide = torch.randn(*(size + 2 for size in shape), dtype=dtype)
    if channels_last and len(shape) > 3:
        wide = wide.contiguous(memory_format=torch.channels_last if len(shape) == 4 else torch.channels_last_3d)
    for d, size in enumerate(shape):
        wide = wide.narrow(d, 1, size)
    return wide


def _tensors(case: Case, dtype: torch.dtype = torch.float32, channels_last: bool = False) -> tuple[Tensor, ...]:
    filters = case.channels * case.multiplier
    x = _view(case.batch, case.channels, *case.image, dtype=dtype, channels_last=channels_last)
    dw = _view(filters, 1, *case.kernel, dtype=dtype)
    pw = _view(7, filters, *(1 for _ in case.image), dtype=dtype)
    return x, dw, _view(filters, dtype=dtype), pw, _view(7, dtype=dtype)


def _geometry(case: Case) -> tuple[Any, ...]:
    g = case.geometry
    return g.stride, g.padding, g.dilation


@pytest.mark.parametrize(("case", "channels_last"), arranged(_cases, _LAYOUTS))
def test_depthwise_conv(case: Case, channels_last: bool, assert_rounding: Callable[..., None]) -> None:
    x, w, b, _, _ = _tensors(case, channels_last=channels_last)
    y = _DEPTHWISE[case.dims](x, w, b, case.stride, case.padding, case.dilation)
    truth = reference.depthwise_conv(x.double(), w.double(), b.double(), *_geometry(case))
    magnitude = reference.depthwise_conv(*(t.abs().double() for t in (x, w, b)), *_geometry(case))
    assert_rounding(y, truth, magnitude, w[0].numel() + 1)


@pytest.mark.parametrize(("case", "channels_last"), arranged(_cases, _LAYOUTS))
def test_separable_conv(case: Case, channels_last: bool, assert_rounding: Callable[..., None]) -> None:
    x, dw, db, pw, pb = _tensors(case, channels_last=channels_last)
    y = _SEPARABLE[case.dims](x, dw, pw, db, pb, case.stride, case.padding, case.dilation)
    doubles = [t.double() for t in (x, dw, pw, db, pb)]
    truth = reference.separable_conv(*doubles, *_geometry(case))
    magnitude = reference.separable_conv(*(t.abs() for t in doubles), *_geometry(case))
    assert_rounding(y, truth, magnitude, dw[0].numel() + pw.shape[1] + 2)


@pytest.mark.parametrize(("case", "channels_last"), arranged(_cases, _LAYOUTS))
def test_depthwise_gradients(case: Case, channels_last: bool, assert_rounding: Callable[..., None]) -> None:
    x, w, b, _, _ = _tensors(case, channels_last=channels_last)
    leaves = [t.clone().requires_grad_() for t in (x, w, b)]
    y = _DEPTHWISE[case.dims](*leaves, case.stride, case.padding, case.dilation)
    g = torch.randn_like(y)
    grads = torch.autograd.grad(y, leaves, g)
    truths, sizes = [], []
    for values, results in ((lambda t: t.double(), truths), (lambda t: t.double().abs(), sizes)):
        doubles = [values(t.detach()).requires_grad_() for t in (x, w, b)]
        results += torch.autograd.grad(
            reference.depthwise_conv(*doubles, *_geometry(case)), doubles, values(g), materialize_grads=True
        )
    for grad, truth, size, terms in zip(
        grads, truths, sizes, (w[0].numel() * case.multiplier, y[:, 0].numel(), y[:, 0].numel()), strict=True
    ):
        assert_rounding(grad, truth, size, terms + 1)


@pytest.mark.parametrize("activation", NAMES)
def test_activations_and_their_gradients(activation: str) -> None:
    case = next(c for c in CASES if c.name == "multiplier_2")
    tensors = [t.clone().requires_grad_() for t in _tensors(case, torch.float64)]
    x, dw, db, pw, pb = tensors
    options = {"depthwise_activation": activation, "activation": activation}
    y = sepconv.separable_conv2d(x, dw, pw, db, pb, padding=1, **options)
    truth = reference.separable_conv(x, dw, pw, db, pb, *_geometry(case), activation, activation)
    torch.testing.assert_close(y, truth, rtol=1e-12, atol=1e-12)
    g = torch.randn_like(y)
    # PyTorch multiplies by a sixth in float32 there, whatever the numbers.
    rounding = 1e-7 if activation == "hardsigmoid" else 1e-10
    for grad, expected in zip(torch.autograd.grad(y, tensors, g), torch.autograd.grad(truth, tensors, g), strict=True):
        torch.testing.assert_close(grad, expected, rtol=rounding, atol=rounding / 100)


@pytest.mark.parametrize("activation", [None, "relu6", "silu", "hardswish", "gelu"])
@pytest.mark.parametrize("case", _small, ids=lambda c: c.name)
def test_gradcheck_of_first_and_second_order(case: Case, activation: str | None) -> None:
    tensors = [t.clone().requires_grad_() for t in _tensors(case, torch.float64)]
    function = _SEPARABLE[case.dims]

    def separable(x: Tensor, dw: Tensor, db: Tensor, pw: Tensor, pb: Tensor) -> Tensor:
        geometry = (case.stride, case.padding, case.dilation)
        return function(x, dw, pw, db, pb, *geometry, depthwise_activation=activation, activation=activation)

    assert torch.autograd.gradcheck(separable, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(separable, tensors, fast_mode=True)


def test_operators_differentiate_every_activation() -> None:
    """The operators themselves, which the public functions call without an activation where autograd is cheaper."""
    x, dw, db, pw, pb = (t.clone().requires_grad_() for t in _tensors(_small[0], torch.float64))
    g = _small[0].geometry
    geometry = flat(g)
    residual = torch.randn(2, 7, 13, 6, dtype=torch.float64, requires_grad=True)
    for activation in ("relu", "silu", "hardswish", "gelu", "sigmoid", "mish", "leaky_relu(0.2)", "hardsigmoid"):
        assert torch.autograd.gradcheck(
            lambda *t, a=activation: torch.ops.sepconv.depthwise_conv(*t, *geometry, a), (x, dw, db), fast_mode=True
        )
        assert torch.autograd.gradcheck(
            lambda *t, a=activation: torch.ops.sepconv.separable_conv(*t, *geometry, a, a),
            (x, dw, pw, db, pb, residual),
            fast_mode=True,
        )
        z = torch.randn(2, dw.shape[0], 13, 6, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(
            lambda *t, a=activation: torch.ops.sepconv.pointwise_conv(*t, a), (z, pw, pb, residual), fast_mode=True
        )


# Of PyTorch 2.14, about the tensors of opcheck itself: it hides the warning, but not from a filter that raises.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize(
    ("case", "channels_last"),
    [
        pytest.param(case, last, marks=() if case is _small[0] and not last else pytest.mark.slow)
        for case in _small
        for last in (False, True)
        if not last or case.dims == 2
    ],
)
def test_opcheck(case: Case, channels_last: bool) -> None:
    x, dw, db, pw, pb = (t.clone().requires_grad_() for t in _tensors(case, channels_last=channels_last))
    if channels_last:
        x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    g = case.geometry
    geometry = [list(entries) for entries in flat(g)]
    ops = torch.ops.sepconv
    y = ops.depthwise_conv(x, dw, db, *geometry, "")
    # It compares gradients of two runs whose layouts, and so whose orders of summation, may differ.
    opcheck = partial(torch.library.opcheck, rtol=1e-4, atol=1e-4)
    opcheck(ops.depthwise_conv.default, (x, dw, db, *geometry, "relu"))
    opcheck(ops.depthwise_conv_grad_input.default, (y.detach(), dw, list(x.shape), *geometry))
    opcheck(ops.depthwise_conv_grad_weight.default, (y.detach(), x, list(dw.shape), *geometry))
    opcheck(ops.pointwise_conv.default, (y.detach(), pw, pb, None, "relu6"))
    opcheck(ops.separable_conv.default, (x, dw, pw, db, pb, None, *geometry, "relu6", ""))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_pointwise_conv_with_stride_and_residual(dims: int, assert_rounding: Callable[..., None]) -> None:
    image = (7, 5, 9)[:dims]
    x, w, b = _view(2, 5, *image), _view(3, 5, *(1,) * dims), _view(3)
    y = _POINTWISE[dims](x, w, b, stride=2)
    seen = x[(..., *(slice(None, None, 2),) * dims)]
    truth = reference.pointwise_conv(seen.double(), w.double(), b.double())
    magnitude = reference.pointwise_conv(seen.double().abs(), w.double().abs(), b.double().abs())
    assert_rounding(y, truth, magnitude, 6)
    residual = _view(*y.shape)
    added = _POINTWISE[dims](x, w, b, stride=2, residual=residual, activation="relu")
    assert_rounding(added, (truth + residual.double()).relu(), magnitude + residual.double().abs(), 7)


def test_unbatched_input_gives_unbatched_output() -> None:
    x, dw, pw = torch.randn(4, 9, 8), torch.randn(8, 1, 3, 3), torch.randn(5, 8, 1, 1)
    torch.testing.assert_close(sepconv.depthwise_conv2d(x, dw), sepconv.depthwise_conv2d(x[None], dw)[0])
    torch.testing.assert_close(sepconv.separable_conv2d(x, dw, pw), sepconv.separable_conv2d(x[None], dw, pw)[0])
    y = sepconv.depthwise_conv2d(x, dw)
    torch.testing.assert_close(sepconv.pointwise_conv2d(y, pw), sepconv.pointwise_conv2d(y[None], pw)[0])


@pytest.mark.parametrize("case", [c for c in _cases if c.dims == 2 and c.batch], ids=lambda c: c.name)
def test_output_has_the_layout_of_the_input(case: Case) -> None:
    x, dw, db, pw, pb = _tensors(case)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        y = sepconv.depthwise_conv2d(
            x.contiguous(memory_format=memory_format), dw, db, case.stride, case.padding, case.dilation
        )
        assert y.is_contiguous(memory_format=memory_format) or case.channels == 1
        z = sepconv.pointwise_conv2d(y, pw, pb)
        assert z.is_contiguous(memory_format=memory_format) or case.channels == 1


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_have_the_strides_of_the_weights(compiled: bool) -> None:
    """DistributedDataParallel warns otherwise, also where only dimensions of size 1 differ."""
    layer = SeparableConv2d(8, 5, 3, padding=1).to(memory_format=torch.channels_last)
    x = torch.randn(2, 8, 9, 7).contiguous(memory_format=torch.channels_last)
    run = torch.compile(layer, backend="aot_eager") if compiled else layer
    layer.pointwise(layer.depthwise(x)).sum().backward()
    first = [parameter.grad for parameter in layer.parameters()]
    layer.zero_grad()
    run(x).sum().backward()
    strides = [(9, 1, 3, 1), (1,), (8, 1, 8, 8), (1,)]
    assert [parameter.stride() for parameter in layer.parameters()] == strides
    assert [grad.stride() for grad in first if grad is not None] == strides
    assert [parameter.grad.stride() for parameter in layer.parameters() if parameter.grad is not None] == strides


def test_autocast_computes_in_the_lower_precision() -> None:
    x, dw, pw = torch.randn(2, 8, 9, 7), torch.randn(8, 1, 3, 3, requires_grad=True), torch.randn(5, 8, 1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        y = sepconv.separable_conv2d(x, dw, pw, padding=1)
        expected = torch.nn.functional.conv2d(torch.nn.functional.conv2d(x, dw, None, 1, 1, 1, 8), pw)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected.float(), rtol=2**-6, atol=2**-6)
    y.float().sum().backward()
    assert dw.grad is not None
    assert dw.grad.dtype == torch.float32


def test_double_precision_runs_through_pytorch_and_says_so() -> None:
    x, dw = torch.randn(1, 4, 9, 7).double(), torch.randn(4, 1, 3, 3).double()
    [choice] = sepconv.explain(sepconv.depthwise_conv2d, x, dw)
    assert choice.kernel == "torch"
    assert choice.reasons["halide"]
    assert sepconv.depthwise_conv2d(x, dw).dtype == torch.float64


def test_compile_without_graph_breaks() -> None:
    def function(x: Tensor, dw: Tensor, pw: Tensor) -> Tensor:
        y = sepconv.separable_conv2d(x, dw, pw, padding="same", depthwise_activation="relu6", activation="silu")
        return sepconv.depthwise_conv2d(y, dw[:5], stride=2).sum()

    tensors = [torch.randn(2, 6, 9, 7), torch.randn(6, 1, 3, 3), torch.randn(5, 6, 1, 1)]
    leaves = [t.clone().requires_grad_() for t in tensors]
    expected = torch.autograd.grad(function(*leaves), leaves)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), function(*tensors))
    for grad, truth in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
        torch.testing.assert_close(grad, truth)


def test_export_consists_of_plain_convolutions() -> None:
    layer = sepconv.SeparableConv2d(6, 5, 3, padding=1, activation="relu6")
    program = torch.export.export(layer, (torch.randn(2, 6, 9, 7),))
    targets = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert sum("conv2d" in t for t in targets) == 2
    assert not any("sepconv" in t for t in targets)
    x = torch.randn(2, 6, 9, 7)
    torch.testing.assert_close(program.module()(x), layer(x))


def test_vmap_agrees_with_a_loop() -> None:
    x, dw = torch.randn(3, 2, 4, 9, 7), torch.randn(4, 1, 3, 3)
    y = torch.vmap(lambda t: sepconv.depthwise_conv2d(t, dw))(x)
    torch.testing.assert_close(y, torch.stack([sepconv.depthwise_conv2d(t, dw) for t in x]))


_x, _dw, _pw = torch.zeros(1, 4, 5, 5), torch.zeros(4, 1, 3, 3), torch.zeros(6, 4, 1, 1)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "depthwise_conv2d: x must be a torch.Tensor, got list", lambda: sepconv.depthwise_conv2d([1], _dw)),
        (TypeError, "x must have a floating dtype, got torch.int64", lambda: sepconv.depthwise_conv2d(_x.long(), _dw)),
        (TypeError, "weight is torch.float64 but x is", lambda: sepconv.depthwise_conv2d(_x, _dw.double())),
        (ValueError, "weight is on meta but x is on cpu", lambda: sepconv.depthwise_conv2d(_x, _dw.to("meta"))),
        (ValueError, r"x must have shape \(N, C, H, W\) or", lambda: sepconv.depthwise_conv2d(_x[0, 0], _dw)),
        (ValueError, r"x must have shape \(N, C, L\)", lambda: sepconv.depthwise_conv1d(_x, _dw)),
        (ValueError, r"must have shape \(C\*M, 1, k, k\)", lambda: sepconv.depthwise_conv2d(_x, _pw)),
        (ValueError, "6 filters, which is no multiple of the 4", lambda: sepconv.depthwise_conv2d(_x, _dw[[0] * 6])),
        (
            ValueError,
            r"bias must have shape \(4,\), got \(3,\)",
            lambda: sepconv.depthwise_conv2d(_x, _dw, _x[0, 0, 0, :3]),
        ),
        (ValueError, "stride must be at least 1, got 0", lambda: sepconv.depthwise_conv2d(_x, _dw, stride=0)),
        (ValueError, "padding must be at least 0, got -1", lambda: sepconv.depthwise_conv2d(_x, _dw, padding=-1)),
        (ValueError, "dilation must be an integer or 2", lambda: sepconv.depthwise_conv2d(_x, _dw, dilation=(1, 1, 1))),
        (ValueError, "stride must be an integer", lambda: sepconv.depthwise_conv2d(_x, _dw, stride=1.5)),
        (ValueError, "'same' or 'valid', got 'full'", lambda: sepconv.depthwise_conv2d(_x, _dw, padding="full")),
        (
            ValueError,
            "padding='same' needs stride 1",
            lambda: sepconv.depthwise_conv2d(_x, _dw, stride=2, padding="same"),
        ),
        (ValueError, "does not fit into the padded image", lambda: sepconv.depthwise_conv2d(_x[..., :2], _dw)),
        (ValueError, "does not fit", lambda: sepconv.depthwise_conv2d(_x[..., :0], _dw, padding=2)),
        (
            ValueError,
            "activation must be None or one of 'relu'",
            lambda: sepconv.depthwise_conv2d(_x, _dw, activation="selu"),
        ),
        (ValueError, "weight has 4 input channels but receives 3", lambda: sepconv.pointwise_conv2d(_x[:, :3], _pw)),
        (ValueError, r"weight must have shape \(O, C, 1, 1\)", lambda: sepconv.pointwise_conv2d(_x, _dw)),
        (
            ValueError,
            r"residual must have shape \(1, 6, 5, 5\)",
            lambda: sepconv.pointwise_conv2d(_x, _pw, residual=_x),
        ),
        (
            ValueError,
            "separable_conv2d: pointwise_weight has 4 input",
            lambda: sepconv.separable_conv2d(_x, _dw[[0] * 8], _pw),
        ),
        (
            ValueError,
            r"pointwise_bias must have shape \(6,\)",
            lambda: sepconv.separable_conv2d(_x, _dw, _pw, None, _x[0, 0, 0]),
        ),
        (TypeError, "explain: op must be a function or a module, got int", lambda: sepconv.explain(3)),
    ],
)
def test_wrong_arguments(error: type[Exception], message: str, call: Callable[[], object]) -> None:
    with pytest.raises(error, match=message):
        call()


def test_operators_take_uneven_padding_low_before_high() -> None:
    g = Geometry((2, 1), ((0, 2), (3, 1)), (1, 2))
    assert flat(g) == ((2, 1), [0, 2, 3, 1], (1, 2))
    assert geometry_of(*flat(g)) == g
    x, weight = torch.randn(2, 3, 8, 11, dtype=torch.float64), torch.randn(3, 1, 3, 2, dtype=torch.float64)
    y = torch.ops.sepconv.depthwise_conv(x, weight, None, *flat(g), "")
    torch.testing.assert_close(y, reference.depthwise_conv(x, weight, None, *g))
