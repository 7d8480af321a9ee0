"""Packed weights are never stale, whatever happens to the weight, and the cache stays small."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_checks import pointwise_case, pointwise_forward
from torch import Tensor, nn

from sepconv.kernels.halide.conv import pointwise
from sepconv.kernels.halide.jit import packing, runtime

pytestmark = pytest.mark.skipif(bool(runtime.missing()), reason=runtime.missing())

# Above and below the size from which weights are hashed instead of compared.
SIZES = [(8, 16), (96, 64)]


def layer(out_channels: int, channels: int) -> nn.Conv2d:
    return nn.Conv2d(channels, out_channels, 1)


def swap_data(conv: nn.Conv2d) -> None:
    conv.weight.data = torch.randn_like(conv.weight)


def swap_data_at_the_same_address(conv: nn.Conv2d) -> None:
    address = conv.weight.data_ptr()
    conv.weight.data.copy_(torch.randn_like(conv.weight))
    assert conv.weight.data_ptr() == address


def change_one_number(conv: nn.Conv2d) -> None:
    conv.weight.data.view(-1)[-1] += 1.0


def flip_all_signs(conv: nn.Conv2d) -> None:
    conv.weight.data.neg_()


def load_state(conv: nn.Conv2d) -> None:
    conv.load_state_dict(layer(conv.out_channels, conv.in_channels).state_dict())


def change_through_numpy(conv: nn.Conv2d) -> None:
    conv.weight.detach().numpy()[0] *= 3.0


def optimizer_step(optimizer: Callable[..., torch.optim.Optimizer], **options: Any) -> Callable[[nn.Conv2d], None]:
    def step(conv: nn.Conv2d) -> None:
        conv(torch.randn(1, conv.in_channels, 3, 3)).square().sum().backward()
        optimizer(conv.parameters(), lr=0.1, **options).step()

    return step


CHANGES: dict[str, Callable[[nn.Conv2d], Any]] = {
    "swap_data": swap_data,
    "swap_data_at_the_same_address": swap_data_at_the_same_address,
    "data_mul": lambda conv: conv.weight.data.mul_(2.0),
    "no_grad_add": lambda conv: conv.weight.detach().add_(1.0),
    "change_one_number": change_one_number,
    "flip_all_signs": flip_all_signs,
    "load_state_dict": load_state,
    "change_through_numpy": change_through_numpy,
    "change_bias": lambda conv: conv.bias.data.add_(1.0),
    "sgd": optimizer_step(torch.optim.SGD),
    "sgd_foreach": optimizer_step(torch.optim.SGD, foreach=True),
    "adam_fused": optimizer_step(torch.optim.Adam, fused=True),
    "adamw_foreach": optimizer_step(torch.optim.AdamW, foreach=True),
}


def run(conv: nn.Conv2d, x: Tensor) -> Tensor:
    assert conv.bias is not None
    return pointwise_forward(x, conv.weight, conv.bias)


@pytest.mark.parametrize("size", SIZES, ids=["compared", "hashed"])
@pytest.mark.parametrize("change", CHANGES)
def test_packed_weights_are_never_stale(change: str, size: tuple[int, int]) -> None:
    conv = layer(*size)
    x = torch.randn(1, size[1], 4, 8).contiguous(memory_format=torch.channels_last)
    before = run(conv, x)
    CHANGES[change](conv)
    after = run(conv, x)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, conv(x).detach(), rtol=1e-4, atol=1e-4)


def test_a_new_weight_at_an_old_address_is_packed_again() -> None:
    memory = torch.randn(16, 8, 1, 1)
    x = torch.randn(1, 8, 4, 8).contiguous(memory_format=torch.channels_last)
    pointwise_forward(x, memory.view(16, 8, 1, 1), None)
    memory.copy_(torch.randn_like(memory))
    y = pointwise_forward(x, memory.view(16, 8, 1, 1), None)
    torch.testing.assert_close(y, torch.conv2d(x, memory), rtol=1e-4, atol=1e-4)


def packed(weight: Tensor, variant: str = "test") -> tuple[list[Any], list[int]]:
    """What is remembered for a weight, and how often it had to be made."""
    calls: list[int] = []
    result = packing.remembered((weight,), variant, lambda: [calls.append(1), weight.clone()])
    return result, calls


def test_same_content_is_packed_once() -> None:
    weight = torch.randn(70, 70, 1, 1)
    first, calls = packed(weight)
    second, calls_again = packed(weight)
    assert first is second
    assert (len(calls), len(calls_again)) == (1, 0)


def test_packed_copies_go_with_their_weight() -> None:
    gc.collect()
    before = packing.cached_weights()
    weight = torch.randn(5, 5)
    packed(weight)
    packed(weight.view(25), "view")
    assert packing.cached_weights() == before + 2
    del weight
    gc.collect()
    assert packing.cached_weights() == before


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_packed_copy_goes_with_any_of_its_weights(which: int) -> None:
    weights = [torch.randn(5), torch.randn(5), packing.constant(torch.randn(5))]
    before = packing.cached_weights()
    packing.remembered(tuple(weights), "sum", lambda: [1])
    assert packing.cached_weights() == before + 1
    del weights[which]
    gc.collect()
    assert packing.cached_weights() == before


@pytest.mark.parametrize("hashed", [False, True])
def test_weights_that_are_remembered_can_be_swapped(hashed: bool) -> None:
    size = 5000 if hashed else 5
    first, second = torch.nn.Parameter(torch.randn(size)), torch.nn.Parameter(torch.randn(size))
    seen = []
    for _ in range(2):
        seen += packing.remembered((first,), "first", lambda: [float(first.detach()[0])])
        torch.utils.swap_tensors(first, second)
    assert seen == [float(first.detach()[0]), float(second.detach()[0])]


def test_the_cache_is_bounded() -> None:
    weights = [torch.full((1,), float(i)) for i in range(packing.MAX_PACKED + 20)]
    for weight in weights:
        packed(weight)
    assert packing.cached_weights() == packing.MAX_PACKED


def test_many_threads_pack_and_change_their_own_weights() -> None:
    x = torch.randn(1, 16, 4, 8).contiguous(memory_format=torch.channels_last)
    errors: list[str] = []

    def work(seed: int) -> None:
        weight = torch.full((8, 16, 1, 1), float(seed))
        for step in range(50):
            weight.fill_(float(seed + step))
            y = pointwise_forward(x, weight, None)
            expected = x.sum(1, keepdim=True) * float(seed + step)
            if not torch.allclose(y, expected.expand_as(y), rtol=1e-3, atol=1e-3):
                errors.append(f"thread {seed}, step {step}")

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert errors == []


@pytest.mark.parametrize("multiplier", [1, 3])
@pytest.mark.parametrize(("panel", "panels"), [(4, 2), (2, 4), (1, 8)])
def test_pack_orders_weights_by_panel(panel: int, panels: int, multiplier: int) -> None:
    weight = torch.randn(7, 6, 1, 1)
    result = packing.pack(weight, panel, 4, multiplier)
    assert result.shape == (panels, 6, panel)
    groups = 6 // multiplier
    for o in range(8):
        for c in range(6):
            row = (c % multiplier) * groups + c // multiplier
            expected = float(weight[o, c, 0, 0]) if o < 7 else 0.0
            assert float(result[o // panel, row, o % panel]) == expected


@pytest.mark.parametrize("count", [4096, 4096 + 1, 65536 + 63])
def test_fingerprint_sees_every_number(count: int) -> None:
    weight = torch.randn(count)
    before = packing.fingerprint(weight)
    for position in (0, 1, 63, 64, count // 2, count - 2, count - 1):
        kept = float(weight[position])
        weight[position] = kept * 2.0
        assert packing.fingerprint(weight) != before, f"position {position}"
        weight[position] = kept
    assert packing.fingerprint(weight) == before
    assert packing.fingerprint(weight * 2.0) != before
    assert packing.fingerprint(-weight) != before
    assert packing.fingerprint(weight.flip(0)) != before


def test_one_packed_copy_serves_images_of_several_sizes() -> None:
    weight, bias = torch.randn(96, 64, 1, 1), torch.randn(96)
    images = [torch.randn(2, 64, side, 5).contiguous(memory_format=torch.channels_last) for side in (9, 4, 13)]
    ready = [pointwise.prepare(pointwise_case(x, weight, bias)) for x in images]
    kept = packing.cached_weights()
    for x, prepared in [*zip(images, ready, strict=True)] * 2:
        torch.testing.assert_close(prepared(x, weight, bias), torch.conv2d(x, weight, bias), rtol=1e-4, atol=1e-4)
    assert packing.cached_weights() == kept + 1


def test_a_weight_with_gaps_is_hashed_by_its_own_numbers() -> None:
    memory = torch.randn(192, 64)
    weight = memory[::2]
    before = packing.fingerprint(weight)
    assert before == packing.fingerprint(weight.clone())
    memory[1::2] += 1.0  # what lies between
    assert packing.fingerprint(weight) == before
    memory[190, 63] += 1.0
    assert packing.fingerprint(weight) != before
