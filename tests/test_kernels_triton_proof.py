"""The proof before use, without a GPU: kernels that are wrong, slow, broken or good, and what is remembered of them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from threading import Thread
from time import sleep
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kernel_checks import depthwise_case
from torch import Tensor

from sepconv.kernels.case import Case
from sepconv.kernels.halide.jit import code_cache
from sepconv.kernels.torch import prepared
from sepconv.kernels.triton import depthwise, plan, proof, tiles, verdicts
from sepconv.kernels.triton.events import Times
from sepconv.kernels.triton.proof import Kernel, Verdict, Workbench

_WALK = (1, 1), ((1, 1), (1, 1)), (1, 1)
_SLOW, _FAST = Times(0.04, 0.05), Times(0.01, 0.02)


@pytest.fixture(autouse=True)
def verdict_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv(code_cache.VARIABLE, str(tmp_path))
    verdicts.forget()
    depthwise._proofs.clear()
    yield tmp_path
    verdicts.forget()


def _case(dtype: torch.dtype = torch.float32, activation: str = "", channels: int = 5) -> Case:
    x, weight = torch.randn(2, channels, 7, 6).to(dtype), torch.randn(channels, 1, 3, 3).to(dtype)
    return depthwise_case("forward", x, weight, *_WALK, activation, bias=torch.randn(channels).to(dtype))


def _gradient_case(which: str) -> Case:
    grad, other = torch.randn(2, 5, 7, 6), torch.randn(5, 1, 3, 3)
    if which == "grad_weight":
        return depthwise_case(which, grad, grad, *_WALK, size=other.shape)
    return depthwise_case(which, grad, other, *_WALK, size=grad.shape)


def _bench(**times: Times) -> Workbench:
    """Everything runs; how long it takes is told by ``times``, of tiles ``_0``, ``_1`` ..."""

    def time(calls: Mapping[str, Callable[[], object]]) -> dict[str, Times]:
        for call in calls.values():
            call()
        return {name: times[name if name == "torch" else f"_{name}"] for name in calls}

    return Workbench(proof._run, proof.compare, time)


def _good(case: Case) -> Kernel:
    return prepared.depthwise(case)


def _wrong(case: Case) -> Kernel:
    """One tap of one filter is lost."""
    right = prepared.depthwise(case)

    def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        weight = weight.clone()
        weight[3, 0, 2, 1] += 1
        return right(x, weight, bias)

    return run


def _fail(*given: Any) -> Any:
    raise RuntimeError("out of resource: registers\nand a page of details")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ["", "relu", "gelu"])
def test_what_is_right_and_faster_is_used(dtype: torch.dtype, activation: str) -> None:
    case = _case(dtype, activation)
    found = proof.prove(case, [lambda: _good(case)], _bench(torch=_SLOW, _0=_FAST))
    assert found == Verdict(0, _FAST, _SLOW)
    assert found.reason == ""


@pytest.mark.parametrize("which", ["grad_input", "grad_weight"])
def test_gradients_are_proven_too(which: str) -> None:
    case = _gradient_case(which)
    found = proof.prove(case, [lambda: _good(case)], _bench(torch=_SLOW, _0=_FAST))
    assert found.reason == ""
    wrong = proof.prove(case, [lambda: lambda *given: _good(case)(*given) + 1], _bench(torch=_SLOW, _0=_FAST))
    assert wrong.reason.startswith("its result is wrong")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_wrong_is_never_used_nor_timed(dtype: torch.dtype) -> None:
    case = _case(dtype)
    found = proof.prove(case, [lambda: _wrong(case)], Workbench(proof._run, proof.compare, _fail))
    wrong, of = (int(word) for word in found.reason.split() if word.isdigit())
    assert found.reason == f"its result is wrong: {wrong} of 420 numbers"
    assert (of, found.lasting) == (420, True)
    assert 40 < wrong <= 84  # those of one channel, but where a pixel or padding is 0


def test_one_wrong_tile_is_a_reason_against_all() -> None:
    case = _case()
    found = proof.prove(case, [lambda: _good(case), lambda: _wrong(case)], _bench(torch=_SLOW, _0=_FAST, _1=_FAST))
    assert (found.schedule, found.reason[:19]) == (1, "its result is wrong")


def test_what_another_tile_wrote_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is used again holds right results."""
    case = _case()
    memory = torch.empty(case.result.elements)
    monkeypatch.setattr(torch, "empty_strided", lambda size, stride, **options: memory.as_strided(size, stride))

    def write(images: int) -> Kernel:
        def run(*tensors: Any) -> Tensor:
            y = torch.empty_strided(case.result.shape, case.result.stride)
            y[:images] = _good(case)(*tensors)[:images]
            return y

        return run

    found = proof.prove(case, [lambda: write(2), lambda: write(1)], _bench(torch=_SLOW))
    assert (found.schedule, found.reason[:19]) == (1, "its result is wrong")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_was_not_written_is_wrong(value: float) -> None:
    case = _case()

    def run(*tensors: Any) -> Tensor:
        y = _good(case)(*tensors)
        y[1, 4, 6, 5] = value
        return y

    assert proof.prove(case, [lambda: run], _bench()).reason == "its result is wrong: 1 of 420 numbers"
    assert "sizes (2, 5, 7, 5)" in proof.prove(case, [lambda: lambda *t: _good(case)(*t)[..., 1:]], _bench()).reason


def test_large_results_are_compared_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the comparison would take several times their memory."""
    compared, wrong = [], proof._wrong
    monkeypatch.setattr(proof, "_COMPARED", 450)
    monkeypatch.setattr(proof, "_wrong", lambda ours, *given: compared.append(ours.numel()) or wrong(ours, *given))
    truth = torch.ones(5, 5, 7, 6)
    result = truth.clone()
    result[0, 1, 2, 3] = result[4, 4, 6, 5] = torch.nan
    assert proof.compare(result, truth, "") == "its result is wrong: 2 of 1050 numbers"
    assert compared == [420, 420, 210]


@pytest.mark.parametrize(
    ("ours", "reason"),
    [
        (Times(0.05, 0.01), "it takes 0.0500 ms on this device, PyTorch's kernel 0.0400 ms"),
        (Times(0.0389, 0.01), "it takes 0.0389 ms on this device, PyTorch's kernel 0.0400 ms"),
        (Times(0.0388, 0.01), ""),
        (Times(0.0, 0.01), "it takes 0.0000 ms on this device, PyTorch's kernel 0.0400 ms"),
        (Times(0.01, 0.06), "called in a row it takes 0.0600 ms on this device, PyTorch's kernel 0.0500 ms"),
    ],
)
def test_what_is_not_three_percent_faster_is_not_used(ours: Times, reason: str) -> None:
    case = _case()
    found = proof.prove(case, [lambda: _good(case)], _bench(torch=_SLOW, _0=ours))
    assert (found.reason, found.lasting) == (reason, True)


def test_the_fastest_tile_is_chosen_and_one_that_does_not_fit_is_left_out() -> None:
    case = _case()
    tried = [lambda: _good(case), lambda: _good(case), lambda: _fail, _fail]
    found = proof.prove(case, tried, _bench(torch=_SLOW, _0=Times(0.03, 0.03), _1=_FAST))
    assert found == Verdict(1, _FAST, _SLOW)


def test_what_fails_is_a_reason_and_no_error() -> None:
    case = _case()
    none = proof.prove(case, [_fail, lambda: _fail], _bench())
    assert (none.reason, none.lasting) == (
        "it could not be compiled: RuntimeError: out of resource: registers",
        False,
    )
    broken = proof.prove(case, [lambda: _good(case)], Workbench(proof._run, proof.compare, _fail))
    assert broken.reason == "it could not be tried: RuntimeError: out of resource: registers"

    def full(*given: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    small = proof.prove(case, [lambda: full], _bench())
    assert (small.reason, small.lasting) == ("there is no memory to compare it with PyTorch's kernel", False)


def test_a_proof_has_tensors_as_the_case_describes_them() -> None:
    whole = torch.randn(3, 9, 8, 7).contiguous(memory_format=torch.channels_last)
    x, bias = whole[:, 2:7, 1:], torch.randn(1).expand(5)
    case = depthwise_case("forward", x, torch.randn(5, 1, 3, 3), *_WALK, bias=bias)
    given = proof.operands(case)
    assert [t.stride() for t in given if t is not None] == [x.stride(), (9, 9, 3, 1), (0,)]
    for tensor in given:
        assert tensor is not None
        assert torch.equal(tensor, tensor.round())
        assert 1 <= tensor.abs().min() <= tensor.abs().max() <= 8
    assert proof.operands(case)[0].unique().numel() == 16
    # Of many products the sums stay below what 16 bits hold, and exact.
    many = x[:1].expand(999, 5, 7, 7)
    long = depthwise_case("grad_weight", many, many, *_WALK, size=(5, 1, 3, 3))
    assert max(float(t.abs().max()) for t in proof.operands(long) if t is not None) == 2


def test_a_proof_leaves_the_users_random_numbers_alone() -> None:
    case, before = _case(), torch.get_rng_state()
    proof.prove(case, [lambda: _good(case)], _bench(torch=_SLOW, _0=_FAST))
    assert torch.equal(torch.get_rng_state(), before)


def test_autocast_does_not_reach_a_proof() -> None:
    """It would take digits from the truth: sums of hundreds have more than bfloat16 holds."""
    x, weight = torch.randn(1, 5, 9, 9).half(), torch.randn(5, 1, 7, 7).half()
    case = depthwise_case("forward", x, weight, (1, 1), ((3, 3), (3, 3)), (1, 1))

    def right(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.conv2d(x.double(), weight.double(), None, 1, 3, 1, 5).half()

    with torch.autocast("cpu", torch.bfloat16):
        assert proof.prove(case, [lambda: right], _bench(torch=_SLOW, _0=_FAST)).reason == ""


def test_threads_prove_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else they would be in each other's times."""
    asked = []

    def slow(case: Case, tried: Any, bench: Any) -> Verdict:
        asked.append(case)
        sleep(0.05)
        return Verdict(0, _FAST, _SLOW)

    monkeypatch.setattr(proof, "prove", slow)
    monkeypatch.setattr(depthwise, "_kernels", lambda case, tried: [])
    case = _case()
    threads = [Thread(target=depthwise.verdict, args=(case,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(asked) == 1


def test_a_case_is_proven_once_whatever_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(proof, "prove", lambda case, tried, bench: asked.append(case) or Verdict(0, _FAST, _SLOW))
    monkeypatch.setattr(depthwise, "_kernels", lambda case, tried: [])
    case = _case()
    for threads in (1, 2, 3):
        assert depthwise.slower(replace(case, threads=threads)) == ""
    assert len(asked) == 1
    told = depthwise.describe(case)
    assert (told["milliseconds"], told["pytorch_milliseconds"]) == (0.01, 0.04)


def test_images_that_all_have_other_sizes_are_not_all_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(proof, "prove", lambda case, tried, bench: asked.append(case) or Verdict(0, _FAST, _SLOW))
    monkeypatch.setattr(depthwise, "_kernels", lambda case, tried: [])
    monkeypatch.setattr(depthwise, "MAX_PROOFS", 2)

    def of(rows: int, filters: int = 3) -> str:
        x, weight = torch.randn(1, 4, rows, 6), torch.randn(4, 1, filters, filters)
        return depthwise.slower(depthwise_case("forward", x, weight, *_WALK))

    assert [of(rows) for rows in (5, 6)] == ["", ""]
    assert of(7) == "2 sizes of this convolution were tried in this process, and no more are"
    assert of(5) == "", "what is known stays"
    assert of(7, filters=5) == "", "another convolution"
    assert len(asked) == 3


def test_what_it_cannot_do_is_said() -> None:
    case = _case()
    assert depthwise.supports(case) == "the kernel runs on cuda tensors but got device cpu"
    assert depthwise.unsuitable(case) == ""
    assert depthwise.unsuitable(_case(torch.float64)).endswith("float16 but got torch.float64")
    mixed = replace(case, weight=case.weight.to(torch.bfloat16))
    assert depthwise.unsuitable(mixed).endswith("but got torch.bfloat16, torch.float32")
    assert depthwise.unsuitable(case.into(case.y)) == "the kernel does not write to given memory"
    x, weight = torch.randn(0, 5, 7, 6), torch.randn(5, 1, 3, 3)
    assert depthwise.unsuitable(depthwise_case("forward", x, weight, *_WALK)) == "there is nothing to compute"
    long = depthwise_case("forward", torch.randn(1, 5, 7, 99), torch.randn(5, 1, 1, 65), *_WALK)
    assert depthwise.unsuitable(long) == "filters have 65 taps in a row, and 63 are the most"
    assert depthwise.unsuitable(replace(case, x=case.x._replace(plain=False))) == (
        "the kernel reads plain strided tensors only"
    )
    large = torch.empty(1, 1, 1, device="meta").expand(2**40, 1, 1)
    many = depthwise_case("forward", large, torch.empty(1, 1, 1, device="meta"), (1,), ((0, 0),), (1,))
    assert "tiles are more than can be counted in 32 bits" in depthwise.unsuitable(many)
    # The first tile that is tried would do here, one of half its size would not.
    wide = torch.empty(1, 1, 1, device="meta").expand(2**24, 1, 12800)
    halves = depthwise_case("forward", wide, torch.empty(1, 1, 1, device="meta"), (1,), ((0, 0),), (1,))
    assert plan.launch(halves, plan.schedules(halves)[0]).tiles < plan.MOST
    assert depthwise.unsuitable(halves) == "3355443200 tiles are more than can be counted in 32 bits"
    grad = depthwise_case("grad_weight", large, large, (1,), ((0, 0),), (1,), size=(1, 1, 1))
    assert "tiles are more than can be counted in 32 bits" in depthwise.unsuitable(grad)
    filters, volume = (torch.empty(shape, device="meta") for shape in ((9000, 1, 63, 63, 63), (1, 9000, 63, 63, 63)))
    huge = depthwise_case("forward", volume, filters, (1,) * 3, ((0, 0),) * 3, (1,) * 3)
    assert "the filters have 2250423000 numbers, and offsets of 32 bits reach 2147483647" in depthwise.unsuitable(huge)


def test_what_of_triton_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    depthwise.missing.cache_clear()
    monkeypatch.setitem(sys.modules, "triton", None)
    assert depthwise.missing().endswith("pip install 'sepconv[gpu]'")
    depthwise.missing.cache_clear()
    with monkeypatch.context() as amd:
        amd.setattr(torch.version, "hip", "7.0")
        assert depthwise.missing().endswith("install PyTorch's build for ROCm again, which brings it")
    depthwise.missing.cache_clear()
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3.4.0"))
    assert "has version 3.4.0, and 3.5 (of PyTorch 2.9) is the first that will do" in depthwise.missing()
    depthwise.missing.cache_clear()


def test_nothing_is_proven_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    case, asked = _case(), []
    there = replace(case, x=case.x._replace(device=torch.device("cuda", 1)))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext(asked.append(device)))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert "a CUDA graph is captured" in depthwise.postponed(there)
    assert asked == [torch.device("cuda", 1)], "of several GPUs that one may not be the current one"
    assert depthwise.postponed(case) == ""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert depthwise.postponed(there) == ""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert "torch.compile traces" in depthwise.postponed(there)


@pytest.mark.parametrize("which", ["forward", "grad_input", "grad_weight"])
def test_a_few_tiles_are_tried(which: str) -> None:
    case = _case() if which == "forward" else _gradient_case(which)
    tried = plan.schedules(case)
    assert 1 <= len(tried) <= tiles.MOST
    assert len(set(tried)) == len(tried)
