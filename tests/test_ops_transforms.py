"""Forward-mode differentiation and the transformations of torch.func: as of the same convolutions of PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

import sepconv

# PyTorch's own way of forward-mode differentiation.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit")

_CONV: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
Function = Callable[..., Tensor]


def _plain(op: str, dims: int, activation: str | None) -> Function:
    """The public function written in PyTorch."""
    conv, active = _CONV[dims], getattr(F, activation) if activation else lambda y: y

    def depthwise(x: Tensor, w: Tensor) -> Tensor:
        return active(conv(x, w, None, 2, 1, 1, x.shape[1]))

    if op == "depthwise":
        return depthwise
    if op == "pointwise":
        return lambda x, w, r: active(conv(x, w) + r)
    return lambda x, w, p: active(conv(depthwise(x, w), p))


def _ours(op: str, dims: int, activation: str | None) -> Function:
    function: Function = getattr(sepconv, f"{op}_conv{dims}d")
    if op == "depthwise":
        return lambda x, w: function(x, w, None, 2, 1, activation=activation)
    if op == "pointwise":
        return lambda x, w, r: function(x, w, activation=activation, residual=r)
    active = {"depthwise_activation": activation, "activation": activation}
    return lambda x, w, p: function(x, w, p, None, None, 2, 1, **active)


def _tensors(op: str, dims: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    image, one = (5, 4, 3)[:dims], (1,) * dims
    x = torch.randn(2, 3, *image, dtype=dtype)
    if op == "pointwise":
        return x, torch.randn(2, 3, *one, dtype=dtype), torch.randn(2, 2, *image, dtype=dtype)
    w = torch.randn(6, 1, *(3,) * dims, dtype=dtype)
    return (x, w) if op == "depthwise" else (x, w, torch.randn(2, 6, *one, dtype=dtype))


def _dual(f: Function, tensors: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> Any:
    with forward_ad.dual_level():
        y = f(*[forward_ad.make_dual(t, v) for t, v in zip(tensors, tangents, strict=True)])
        return forward_ad.unpack_dual(y).tangent


def _linearized(f: Function, tensors: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> Any:
    return torch.func.linearize(f, *tensors)[1](*tangents)


def _forward_over_reverse(f: Function, tensors: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> Any:
    return torch.func.jvp(torch.func.grad(lambda *t: f(*t).square().sum(), (0, 1)), tensors, tangents)[1]


def _forward_over_recorded(f: Function, tensors: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> Any:
    """The graph was recorded before there were tangents."""
    leaves = [t.clone().requires_grad_() for t in tensors]
    y = f(*leaves)
    with forward_ad.dual_level():
        tangent = forward_ad.make_dual(torch.ones_like(y), y.detach())
        grads = torch.autograd.grad(y, leaves, tangent, create_graph=True)
        return [forward_ad.unpack_dual(grad).tangent for grad in grads]


def _batched_gradients(f: Function, tensors: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> Any:
    leaves = [t.clone().requires_grad_() for t in tensors]
    y = f(*leaves)
    return torch.autograd.grad(y, leaves, torch.stack([y.detach(), y.detach().cos()]), is_grads_batched=True)


def _vmapped_gradients(f: Function, tensors: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> Any:
    leaves = [t.clone().requires_grad_() for t in tensors]
    y = f(*leaves)
    gradients = partial(torch.autograd.grad, y, leaves, retain_graph=True)
    return torch.func.vmap(gradients)(torch.stack([y.detach(), y.detach().cos()]))


def _twice_batched(f: Function, tensors: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> Any:
    leaves = [t.clone().requires_grad_() for t in tensors]
    grads = torch.autograd.grad(f(*leaves).square().sum(), leaves, create_graph=True)
    basis = [torch.stack([g.detach(), g.detach().cos()]) for g in grads]
    return torch.autograd.grad(grads, leaves, basis, is_grads_batched=True)


def _of_one_another(f: Function, tensors: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> Any:
    """One argument is made of another: its way back is no part of the gradient of the other."""
    leaves = [t.clone().requires_grad_() for t in tensors]
    y = f(leaves[0] * leaves[1].sum(), *leaves[1:])
    return torch.autograd.grad(y, leaves, y.detach()[None], is_grads_batched=True)


def _jacobians(f: Function, tensors: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> Any:
    return [jacobian(f, 1)(*tensors) for jacobian in (torch.func.jacfwd, torch.func.jacrev)]


def _per_sample(f: Function, tensors: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> Any:
    x, w, *others = tensors
    # The residual has a batch of its own; the pointwise weight has not.
    own = bool(others) and others[0].shape[0] == len(x) and others[0].shape[2:] == x.shape[2:]

    def loss(w: Tensor, x: Tensor, *others: Tensor) -> Tensor:
        return f(x[None], w, *[t[None] if own else t for t in others]).square().sum()

    return torch.func.vmap(torch.func.grad(loss), (None, 0, *[0 if own else None] * len(others)))(w, x, *others)


_TRANSFORMS = [_dual, _linearized, _forward_over_reverse, _forward_over_recorded, _batched_gradients]
_TRANSFORMS += [_vmapped_gradients, _twice_batched, _of_one_another, _jacobians, _per_sample]
_LONG = [_linearized, _twice_batched]


def _assert_same(ours: Any, theirs: Any, dtype: torch.dtype) -> None:
    limit = 1e-10 if dtype == torch.float64 else 1e-3
    torch.testing.assert_close(ours, theirs, rtol=limit, atol=limit)


# PyTorch says of its own convolutions that it takes one gradient after the other, and what linearize records.
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")
@pytest.mark.parametrize(
    ("transform", "dtype"),
    [
        pytest.param(
            transform,
            dtype,
            marks=[pytest.mark.slow] * (dtype is torch.float64 and transform in _LONG),
            id=f"{transform.__name__}-{dtype}",
        )
        for dtype in (torch.float32, torch.float64)
        for transform in _TRANSFORMS
    ],
)
def test_functions(transform: Callable[..., Any], dtype: torch.dtype) -> None:
    for op in ("depthwise", "pointwise", "separable"):
        for dims, activation in ((1, "silu"), (2, "gelu"), (2, "relu6"), (3, "hardswish")):
            tensors = _tensors(op, dims, dtype)
            tangents = tuple(torch.randn_like(t) for t in tensors)
            ours, theirs = (make(op, dims, activation) for make in (_ours, _plain))
            _assert_same(transform(ours, tensors, tangents), transform(theirs, tensors, tangents), dtype)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
def test_vectorized_jacobians_and_hessians(strategy: str) -> None:
    x, w, p = _tensors("separable", 2, torch.float64)
    results = []
    for make in (_ours, _plain):
        f = make("separable", 2, "silu")
        jacobian = torch.autograd.functional.jacobian(lambda w, f=f: f(x, w, p), w, vectorize=True, strategy=strategy)
        hessian = torch.autograd.functional.hessian(
            lambda w, f=f: f(x, w, p).square().sum(), w, vectorize=True, outer_jacobian_strategy=strategy
        )
        results.append((jacobian, hessian))
    _assert_same(*results, torch.float64)


def _layers() -> list[tuple[nn.Module, nn.Module]]:
    """Ours, and the same of PyTorch's modules, with the same parameters in the same order."""
    pairs: list[tuple[nn.Module, nn.Module]] = []
    for dims, conv in ((1, nn.Conv1d), (2, nn.Conv2d), (3, nn.Conv3d)):
        norm: Any = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
        depthwise = getattr(sepconv, f"DepthwiseConv{dims}d")
        pairs.append((depthwise(3, 3, padding=1, depth_multiplier=2), conv(3, 6, 3, padding=1, groups=3)))
        pairs.append((getattr(sepconv, f"PointwiseConv{dims}d")(3, 2), conv(3, 2, 1)))
        layer = getattr(sepconv, f"SeparableConv{dims}d")(3, 2, 3, norm="batch", activation="silu")
        parts = [conv(3, 3, 3, groups=3), norm(3), nn.SiLU(), conv(3, 2, 1), norm(2), nn.SiLU()]
        pairs.append((layer.eval(), nn.Sequential(*parts).eval()))
    for ours, theirs in pairs:
        theirs.load_state_dict(dict(zip(theirs.state_dict(), ours.state_dict().values(), strict=True)))
    return pairs


def _of_parameters(layer: nn.Module) -> list[Tensor]:
    """Tangent of the output and gradients of each sample, by functional_call."""
    names, values = zip(*layer.named_parameters(), strict=True)
    dims = values[0].dim() - 2
    x = torch.linspace(-1, 1, 2 * 3 * 5**dims).reshape(2, 3, *(5,) * dims)

    def f(values: Any, x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    _, tangent = torch.func.jvp(lambda *values: f(values, x), values, tuple(v.cos() for v in values))
    with torch.no_grad():  # where folded norms would be computed without anybody's seeing it
        moved = torch.func.jvp(lambda x: f(values, x), (x,), (x.cos(),))[1]
    samples = torch.func.vmap(torch.func.grad(lambda v, x: f(v, x[None]).square().sum()), (None, 0))(values, x)
    return [tangent, moved, *samples]


def test_layers() -> None:
    for ours, theirs in _layers():
        _assert_same(_of_parameters(ours), _of_parameters(theirs), torch.float32)


def test_transformations_inside_a_compiled_function() -> None:
    x, w = _tensors("depthwise", 2, torch.float32)
    f, plain = _ours("depthwise", 2, "silu"), _plain("depthwise", 2, "silu")
    for transform in (_dual, _forward_over_reverse):
        compiled = torch.compile(partial(transform, f), backend="eager", fullgraph=True)
        if transform is _dual:
            compiled = torch.compile(lambda t, v: torch.func.jvp(f, t, v)[1], backend="eager", fullgraph=True)
        _assert_same(compiled((x, w), (x, w)), transform(plain, (x, w), (x, w)), torch.float32)


def test_explanation_names_the_transformation() -> None:
    x, w = _tensors("depthwise", 2, torch.float32)
    [choice] = sepconv.explain(_dual, _ours("depthwise", 2, None), (x, w), (x, w))
    assert choice.kernel == "torch"
    assert "forward-mode" in choice.reasons["halide"]


def test_operators_refuse_what_they_would_drop() -> None:
    """An operator that another tracer wrote down before there were tangents."""
    x, w = _tensors("depthwise", 2, torch.float32)
    operator = torch.ops.sepconv.depthwise_conv
    with pytest.raises(RuntimeError, match=r"sepconv\.depthwise_conv has no forward-mode derivative"):
        torch.func.jvp(lambda x: operator(x, w, None, [1, 1], [0] * 4, [1, 1], ""), (x,), (x,))
    compiled = torch.compile(_ours("depthwise", 2, None), backend="eager")
    compiled(x, w)
    with pytest.raises(RuntimeError, match=r"transform before torch\.compile"):
        _dual(compiled, (x, w), (x, w))
