"""What Triton's depthwise kernels are launched with: the device, addresses, and the shares of a gradient of filters."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from kernel_checks import depthwise_case
from torch import Tensor
from triton_checks import DEVICE, forward, grad_input, grad_weight, needs_triton

from sepconv.kernels.triton import plan

pytestmark = needs_triton


def test_programs_are_launched_on_the_device_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current device, which of several GPUs may be another."""
    from sepconv.kernels.triton.compiled import launch

    entered: list[torch.device] = []
    with monkeypatch.context() as two:
        two.setattr(torch.cuda, "current_device", lambda: 0)
        two.setattr(torch.cuda, "device", lambda device: nullcontext(entered.append(device)))
        for index in (0, 1):
            with launch._on(torch.device("cuda", index)):
                pass
    assert entered == [torch.device("cuda", 1)]
    on = launch._on
    monkeypatch.setattr(launch, "_on", lambda device: entered.append(device) or on(device))
    x, weight, walk = torch.randn(1, 2, 3, 3).to(DEVICE), torch.randn(2, 1, 1, 1).to(DEVICE), ((1,) * 2, ((0, 0),) * 2)
    forward(x, weight, None, *walk, (1, 1))
    grad_input(x, weight, x.shape, *walk, (1, 1))
    grad_weight(x, x, weight.shape, *walk, (1, 1))
    assert entered[1:] == [x.device] * 3


@pytest.mark.parametrize("how", ["contiguous", "channels_last"])
def test_parameters_may_lie_anywhere(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the flat memory of all parameters, say: what was compiled and proven is for addresses that 16 divides."""
    from sepconv.kernels.triton.compiled import launch

    addresses, gather = [], launch.gather_programs.gather

    class Watch:
        def __getitem__(self, grid: Any) -> Any:
            def run(*given: Any, **options: Any) -> None:
                addresses.append([t.data_ptr() % 16 for t in given if isinstance(t, Tensor)])
                gather[grid](*given, **options)

            return run

    flat, x, walk = torch.randn(27).to(DEVICE), torch.randn(1, 2, 3, 3), ((1, 1), ((1, 1), (1, 1)), (1, 1))
    weight, bias = flat[1:19].view(2, 1, 3, 3), flat[19:21]
    monkeypatch.setattr(launch.gather_programs, "gather", Watch())
    form = torch.channels_last if how == "channels_last" else torch.contiguous_format
    y = forward(x.to(DEVICE).contiguous(memory_format=form), weight, bias, *walk)
    assert addresses == [[0, 0, 0, 0]]
    torch.testing.assert_close(y.cpu(), torch.conv2d(x, weight.cpu(), bias.cpu(), 1, 1, 1, 2), rtol=1e-5, atol=1e-5)


def test_a_gradient_of_filters_is_the_same_in_every_run() -> None:
    """Also where many programs share the images."""
    x, grad = torch.randn(5, 3, 8, 8).to(DEVICE), torch.randn(5, 3, 8, 8).to(DEVICE)
    walk = (1, 1), ((1, 1), (1, 1)), (1, 1)
    known = depthwise_case("grad_weight", grad, x, *walk, size=(3, 1, 3, 3))
    shares = plan.launch(known, plan.schedules(known)[0]).shares
    assert shares is not None
    assert shares.shares > 1
    first, second = (grad_weight(grad, x, (3, 1, 3, 3), *walk) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("shares", [1, 64, 131])
def test_all_shares_are_added(shares: int) -> None:
    """Also more than are read at once, and of more filters than a program has; an interpreted case has few of them."""
    from sepconv.kernels.triton.compiled.filters import add_shares

    partial, out = torch.randn(shares, 3, 37).to(DEVICE), torch.full((37, 1, 1, 3), float("nan")).to(DEVICE)
    add_shares[(6,)](partial, out, shares, 37, 3, AT_ONCE=64, BLOCK=32, num_warps=4)
    truth = partial.cpu().double().sum(0).T.reshape(37, 1, 1, 3)
    torch.testing.assert_close(out.cpu().double(), truth, rtol=1e-5, atol=1e-5)
