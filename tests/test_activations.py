"""Every record says the same function in every form that it has."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

from sepconv import activations, reference
from sepconv.activations import ACTIVATIONS, NAMES, Activation, clamping, is_name, name_of

_SPECIAL = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -200.0, 200.0, 3.0, -3.0, 6.0, 0.5, -0.5])
every = pytest.mark.parametrize("record", ACTIVATIONS.values(), ids=lambda record: record.name or "none")


def test_the_truth_knows_the_same_names() -> None:
    assert list(ACTIVATIONS) == list(reference.ACTIVATIONS)
    assert list(NAMES) == [name for name in ACTIVATIONS if name]
    assert all(name == record.name for name, record in ACTIVATIONS.items())


@every
def test_function_and_module_and_operators_are_the_truth(record: Activation) -> None:
    x = torch.cat([_SPECIAL, torch.linspace(-9, 9, 1001)]).double()
    truth = reference.ACTIVATIONS[record.name](x)
    for computed in (record.function(x), record.module()(x), *(operator(x) for operator in record.operators)):
        torch.testing.assert_close(computed, truth, equal_nan=True, rtol=1e-12, atol=1e-14)


@every
def test_derivative_is_that_of_the_truth(record: Activation) -> None:
    x = torch.linspace(-7.3, 7.1, 1001, dtype=torch.float64, requires_grad=True)
    y = reference.ACTIVATIONS[record.name](x)
    grad = torch.rand_like(x)
    (truth,) = torch.autograd.grad(y, x, grad)
    given = y if record.from_output else x
    for inference in (False, True):
        with torch.set_grad_enabled(not inference):
            torch.testing.assert_close(record.backward(grad, given), truth, rtol=1e-12, atol=1e-14)


@every
def test_derivative_can_be_differentiated_again(record: Activation) -> None:
    x = torch.linspace(-7.3, 7.1, 11, dtype=torch.float64, requires_grad=True)
    grad = torch.rand_like(x).requires_grad_()

    def gradient(x: Any, grad: Any) -> Any:
        return record.backward(grad, record.function(x) if record.from_output else x)

    assert torch.autograd.gradcheck(gradient, (x, grad))


@every
def test_limits_say_all_of_a_clamp_and_nothing_of_a_curve(record: Activation) -> None:
    x = torch.linspace(-9, 9, 1001)
    if record.limits is None:
        assert not any(torch.equal(record.function(x), x.clamp(low, high)) for low in (-1, 0) for high in (1, 6))
        return
    assert torch.equal(record.function(x), x.clamp(*record.limits))
    assert clamping(*record.limits) == record.name


def test_name_of_a_module() -> None:
    for record in ACTIVATIONS.values():
        assert name_of(record.module()) == record.name
    assert name_of(None) == ""
    assert name_of(nn.ReLU(inplace=True)) == "relu"

    class Own(nn.ReLU):
        pass

    for other in (nn.GLU(), nn.SELU(), Own()):
        assert name_of(other) is None
    assert clamping(0.0, 1.0) is None


PARAMETERS = {
    "leaky_relu(0.2)": (nn.LeakyReLU(0.2), lambda x: torch.where(x < 0, 0.2 * x, x)),
    "leaky_relu(-0.5)": (nn.LeakyReLU(-0.5), lambda x: torch.where(x < 0, -0.5 * x, x)),
    "elu(0.5)": (nn.ELU(0.5), lambda x: torch.where(x > 0, x, 0.5 * torch.expm1(x))),
    "softplus(2.0, 3.0)": (nn.Softplus(2, 3), lambda x: torch.where(2 * x > 3, x, torch.log1p(torch.exp(2 * x)) / 2)),
    "clamp(-2.0, 0.5)": (nn.Hardtanh(-2, 0.5), lambda x: x.clamp(-2, 0.5)),
    "clamp(-inf, 2.0)": (nn.Hardtanh(-torch.inf, 2.0), lambda x: x.clamp(max=2)),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_stand_behind_the_name(name: str) -> None:
    module, truth = PARAMETERS[name]
    record = ACTIVATIONS[name]
    assert name_of(module) == name_of(record.module()) == record.name == name
    x = torch.cat([_SPECIAL, torch.linspace(-9, 9, 1001)]).double()
    for computed in (record.function(x), record.module()(x)):
        torch.testing.assert_close(computed, truth(x), equal_nan=True, rtol=1e-12, atol=1e-14)
    x = torch.linspace(-7.3, 7.1, 11, dtype=torch.float64, requires_grad=True)
    y = record.function(x)
    grad = torch.rand_like(x).requires_grad_()
    (expected,) = torch.autograd.grad(y, x, grad)
    torch.testing.assert_close(record.backward(grad, y if record.from_output else x), expected)
    assert torch.autograd.gradcheck(
        lambda x, grad: record.backward(grad, record.function(x) if record.from_output else x), (x, grad)
    )


def test_usual_parameters_are_not_named() -> None:
    for module in (
        nn.LeakyReLU(),
        nn.ELU(),
        nn.Softplus(),
        nn.Hardtanh(),
        nn.Hardtanh(0, 6),
        nn.Hardtanh(0, torch.inf),
    ):
        assert "(" not in str(name_of(module))


@pytest.mark.parametrize(
    "name",
    ["leaky_relu()", "leaky_relu(a)", "leaky_relu(1", "leaky_relu(1,2)", "relu(1)", "clamp(1,0)", "clamp(nan,1)", "x"],
)
def test_other_names_are_none(name: str) -> None:
    assert not is_name(name)
    assert not is_name(3)
    with pytest.raises(KeyError):
        ACTIVATIONS[name]


def test_dynamo_looks_through_a_record() -> None:
    @torch.compile(backend="eager", fullgraph=True)
    def activate(x: torch.Tensor, name: str) -> torch.Tensor:
        return ACTIVATIONS[name].function(x)

    x = torch.randn(7)
    for name in ("relu6", "gelu", "leaky_relu(0.2)"):
        assert torch.equal(activate(x, name), ACTIVATIONS[name].function(x))


def test_needs_no_halide() -> None:
    """Only an expression is handed the module; the record itself is for everybody."""
    code = f"import runpy, sys; runpy.run_path({activations.__file__!r}); print('halide' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
