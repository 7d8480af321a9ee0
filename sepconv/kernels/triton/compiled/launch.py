"""Kernels as functions of tensors: memory for the result, filters in the order of the program, and the launch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from math import prod

import torch
from torch import Tensor

from sepconv.kernels.case import Case, Outline
from sepconv.kernels.triton import tiles
from sepconv.kernels.triton.compiled import filters as filter_programs
from sepconv.kernels.triton.compiled import gather as gather_programs
from sepconv.kernels.triton.forms import Schedule
from sepconv.kernels.triton.plan import BYTES_AT_ONCE, Launch, launch

_FILTERS_AT_ONCE = 32
_SHARES_AT_ONCE = 64


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def _new(outline: Outline, device: torch.device) -> Tensor:
    return torch.empty_strided(outline.shape, outline.stride, dtype=outline.dtype, device=device)


def _aligned(numbers: Tensor) -> Tensor:
    """Without gaps, at an address that Triton has the same code for in every call: parameters may lie anywhere."""
    numbers = numbers.contiguous()
    return numbers.clone() if numbers.data_ptr() % BYTES_AT_ONCE else numbers


def _filters(weight: Tensor, prepared: Launch) -> Tensor:
    rows = weight.reshape(weight.shape[0], -1)
    if prepared.steps.of_filter != 1:
        return _aligned(rows)
    # Their numbers are read as often as an image's: side by side, and in the type of the sums.
    return torch.empty(rows.shape[::-1], dtype=torch.float32, device=weight.device).copy_(rows.T)


def gather(case: Case, schedule: Schedule) -> Callable[..., Tensor]:
    """The forward pass, or the gradient of the input."""
    prepared = launch(case, schedule)
    grid, options = (prepared.programs,), tiles.options(prepared.form)

    def run(image: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        out = _new(case.result, image.device)
        with _on(image.device):
            added = out if bias is None else _aligned(bias)
            gather_programs.gather[grid](
                image, _filters(weight, prepared), added, out, prepared.read, prepared.written, prepared.steps,
                FORM=prepared.form, **options,
            )  # fmt: skip
        return out

    return run


def filter_gradient(case: Case, schedule: Schedule) -> Callable[..., Tensor]:
    """By shares of the images, whose sums are then added in an order of their own: the same numbers in every run."""
    prepared = launch(case, schedule)
    assert prepared.shares is not None
    grid, options = (prepared.programs,), tiles.options(prepared.form)
    filters, taps, shares = case.weight.shape[0], prod(case.kernel_size), prepared.shares.shares
    last = (taps * -(-filters // _FILTERS_AT_ONCE),)
    at_once = _SHARES_AT_ONCE if shares > _SHARES_AT_ONCE // 8 else _SHARES_AT_ONCE // 8

    def run(grad: Tensor, image: Tensor) -> Tensor:
        out = _new(case.result, grad.device)
        partial = torch.empty(shares, taps, filters, dtype=torch.float32, device=grad.device)
        with _on(grad.device):
            filter_programs.filter_gradient[grid](
                grad, image, partial, prepared.read, prepared.written, prepared.shares,
                FORM=prepared.form, **options,
            )  # fmt: skip
            filter_programs.add_shares[last](
                partial, out, shares, filters, taps, AT_ONCE=at_once, BLOCK=_FILTERS_AT_ONCE, num_warps=4
            )
        return out

    return run


def kernel(case: Case, schedule: Schedule) -> Callable[..., Tensor]:
    return (filter_gradient if case.which == "grad_weight" else gather)(case, schedule)
