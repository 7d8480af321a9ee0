"""What surrounds a compiled call: arguments and their errors, fallbacks with reasons, threads, processes, memory."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import SamePadded, Several, SqueezeExcite, randomise
from torch import Tensor, nn

from sepconv.compile import CompiledModel, bind, compile, tune
from sepconv.compile.groups import Convolution
from sepconv.compile.model import MAX_SIZES
from sepconv.compile.store import Constant
from sepconv.kernels import backends
from sepconv.kernels.halide.jit import runtime, threads
from sepconv.kernels.halide.jit.runtime import BuildError


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return randomise(SamePadded())


@pytest.fixture(scope="module")
def compiled(model: nn.Module) -> CompiledModel:
    return compile(model, torch.randn(1, 3, 17, 22))


@pytest.fixture
def _restored_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def close(result: Tensor, truth: Tensor) -> None:
    torch.testing.assert_close(result, truth, rtol=1e-5, atol=1e-5)


def test_compile_leaves_the_model_alone(model: nn.Module) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    grads = [parameter.requires_grad for parameter in model.parameters()]
    compile(model, torch.randn(1, 3, 17, 22))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert [parameter.requires_grad for parameter in model.parameters()] == grads


def test_compile_freezes_the_weights() -> None:
    model, x = randomise(SamePadded()), torch.randn(1, 3, 17, 22)
    fast = compile(model, x)
    before, other = fast(x), torch.randn(1, 3, 19, 22)
    truth = model(other)
    with torch.no_grad():
        model.pw.weight.zero_()
    assert torch.equal(fast(x), before)
    close(fast(other), truth)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.randn(3, 17, 22), r"CompiledModel: compiled for 4 dimensions \(1, 3, 17, 22\), got \(3, 17, 22\)"),
        (torch.randn(1, 4, 17, 22), r"CompiledModel: compiled for 3 channels, got 4 in \(1, 4, 17, 22\)"),
        (torch.randn(1, 3, 0, 22), r"CompiledModel: got an input without pixels, \(1, 3, 0, 22\)"),
        (torch.randn(1, 3, 17, 22).half(), r"CompiledModel: compiled for torch.float32, got torch.float16"),
        (torch.randn(1, 3, 17, 22, device="meta"), r"CompiledModel: compiled for cpu, got a tensor on meta"),
        (torch.randn(1, 3, 17, 22, requires_grad=True), r"CompiledModel: computes no gradients"),
        ((torch.randn(1, 3, 17, 22), 1), r"CompiledModel: compiled for arguments"),
        (5, r"CompiledModel: got int where the example has a tensor"),
    ],
    ids=["rank", "channels", "no_pixels", "dtype", "device", "gradient", "number_of_arguments", "no_tensor"],
)
def test_compiled_model_refuses(compiled: CompiledModel, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compiled(*value if isinstance(value, tuple) else (value,))


def test_compile_refuses(model: nn.Module) -> None:
    with pytest.raises(TypeError, match=r"compile: model must be a torch\.nn\.Module, got function"):
        compile(close, torch.randn(1))  # type: ignore[arg-type]
    other = copy.deepcopy(model)
    other.bn2.train()  # type: ignore[union-attr, operator]
    with pytest.raises(ValueError, match=r"compile: bn2 is in training mode; call model\.eval\(\) first"):
        compile(other, torch.randn(1, 3, 17, 22))
    with pytest.raises(ValueError, match=r"compile: threads must be None or a positive integer, got 0"):
        compile(model, torch.randn(1, 3, 17, 22), threads=0)
    with pytest.raises(ValueError, match=r"the model does not accept inputs of shape \[\(1, 4, 8, 8\)\]: .*4 channels"):
        compile(model, torch.randn(1, 4, 8, 8))
    with pytest.raises(ValueError, match=r"arguments must be tensors or constants, got ndarray"):
        compile(Several().eval(), (torch.randn(1, 3, 4, 4), torch.randn(1, 8, 4, 4), torch.ones(2).numpy()))


def test_compiled_model_takes_an_input_that_requires_grad_without_autograd(compiled: CompiledModel) -> None:
    x = torch.randn(1, 3, 17, 22, requires_grad=True)
    with torch.no_grad():
        assert not compiled(x).requires_grad


def test_compiled_model_empty_batch(compiled: CompiledModel) -> None:
    assert compiled(torch.randn(0, 3, 17, 22)).shape == (0, 16, 5, 6)
    assert compiled.explain().reason == "the batch is empty"


def test_compiled_model_results_are_memory_of_their_own(compiled: CompiledModel) -> None:
    x = torch.randn(1, 3, 17, 22)
    first = compiled(x)
    kept = first.clone()
    compiled(torch.randn(1, 3, 17, 22)).zero_()
    assert torch.equal(first, kept)


def test_compiled_model_under_inference_mode_and_autocast(model: nn.Module) -> None:
    x = torch.randn(1, 3, 17, 22)
    with torch.inference_mode():
        fast = compile(model, x)
        result = fast(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fast(x), result)
        new_size = fast(torch.ones(1, 3, 9, 9))
    close(new_size, model(torch.ones(1, 3, 9, 9)))
    assert torch.equal(fast(x), result)


class ByValue(nn.Module):
    """What it computes depends on values, in one of several ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.conv, self.how = nn.Conv2d(3, 8, 3), how
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        if self.how == "decides":
            return y if y.mean() > 0 else -y
        if self.how == "counts":
            self.calls += 1
        if self.how == "numpy":
            return y + torch.from_numpy(y.detach().numpy().copy())
        if self.how == "changes_input":
            x.add_(1)
        return y


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("decides", r"the model cannot be captured: .*DataDependentOutput"),
        ("counts", r"the model cannot be captured: it changes a parameter, a buffer or another tensor that it keeps"),
        ("changes_input", r"the model cannot be captured: it changes its input in place"),
        ("numpy", r"the captured operations give|cannot be captured"),
    ],
)
def test_compile_runs_what_it_cannot_capture_through_pytorch(how: str, reason: str) -> None:
    model, x = ByValue(how).eval(), torch.randn(1, 3, 8, 8)
    given = x.clone()
    with pytest.warns(UserWarning, match=f"compile: the model runs through PyTorch: .*{reason}"):
        fast = compile(model, given)
    assert torch.equal(given, x)
    explained = fast.explain()
    assert re.search(reason, explained.reason)
    assert str(explained).startswith("the whole model runs through PyTorch: ")
    other = torch.randn(2, 3, 8, 8)
    close(fast(other.clone()), model(other.clone()))


def test_compile_other_dtypes_and_devices_run_through_pytorch() -> None:
    half, x = randomise(SamePadded()).half(), torch.randn(1, 3, 17, 22).half()
    with pytest.warns(UserWarning, match="compile: the model runs through PyTorch: the kernels compute in float32"):
        fast = compile(half, x)
    assert fast.explain().reason.endswith("compute in float32 and the model has parameters of torch.float16")
    assert torch.equal(fast(x), half(x))
    with pytest.warns(UserWarning, match="the kernels run on CPUs and the model is on meta"):
        meta = compile(randomise(SamePadded()).to("meta"), torch.empty(1, 3, 17, 22, device="meta"))
    assert meta.explain().reason == "the kernels run on CPUs and the model is on meta"
    assert meta(torch.empty(1, 3, 17, 22, device="meta")).shape == (1, 16, 5, 6)


@pytest.fixture
def _asked_anew() -> Iterator[None]:
    """Kernels are chosen for this test alone."""
    backends.forget()
    yield
    backends.forget()


def _replace_first(monkeypatch: pytest.MonkeyPatch, op: str, **changes: Any) -> None:
    """Another backend in the place of the one that is asked first."""
    first, *others = backends.BACKENDS[op]
    monkeypatch.setitem(backends.BACKENDS, op, [replace(first, **changes), *others])


@pytest.mark.usefixtures("_asked_anew")
def test_compile_falls_back_where_a_kernel_cannot_be_built(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> Any:
        raise BuildError("Halide cannot build this one")

    binder = backends.BACKENDS["separable"][0].binder
    assert binder is not None
    _replace_first(monkeypatch, "separable", binder=replace(binder, bind=broken))
    model, x = randomise(SamePadded()), torch.randn(1, 3, 17, 22)
    with pytest.warns(UserWarning, match="compile: a group runs through PyTorch: Halide cannot build this one"):
        fast = compile(model, x)
    kernels = {group.kind: (group.kernel, group.reason) for group in fast.explain().groups}
    assert kernels == {"normal": ("halide", ""), "separable": ("torch", "Halide cannot build this one")}
    assert "Halide cannot build this one" in str(fast.explain())
    close(fast(x), model(x))


@pytest.mark.usefixtures("_asked_anew")
def test_compile_without_halide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "missing", lambda: "no Halide here")
    model, x = randomise(SqueezeExcite()), torch.randn(2, 8, 13, 11)
    fast = compile(model, x)
    assert {group.kernel for group in fast.explain().groups} == {"torch"}
    close(fast(x), model(x))


def test_compiled_model_does_not_run_pytorch_where_a_kernel_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """What explain says is what happens: PyTorch's path of a group is never entered."""
    model, x = randomise(SqueezeExcite()), torch.randn(2, 8, 13, 11)
    fast = compile(model, x)
    monkeypatch.setattr(bind, "_through_torch", None)
    close(fast(x), model(x))
    assert {g.kernel for g in fast.explain().groups if not g.kind.startswith("aten")} == {"halide"}


def test_explain_measures(compiled: CompiledModel) -> None:
    compiled(torch.randn(1, 3, 17, 22))
    plain, measured = compiled.explain(), compiled.explain(measure=True)
    assert plain.time_us is None
    assert measured.time_us == pytest.approx(sum(group.time_us or 0.0 for group in measured.groups))
    assert all(group.time_us is not None and group.time_us > 0 for group in measured.groups)
    assert all(group.share_of_peak is not None and 0 < group.share_of_peak < 1 for group in measured.groups)
    # 8*9*11*27 for the stem, 8*5*6*9 and 8*16*5*6 for the separable convolution
    assert plain.macs == measured.macs == 21_384 + 2_160 + 3_840
    assert "27,384 multiply-adds, 27,384 of them by Halide kernels" in str(measured)


@pytest.mark.parametrize("choice", ["split", "torch"])
def test_compile_tune_keeps_what_is_fastest(choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fastest(calls: dict[str, Any], arguments: Any) -> str:
        for call in calls.values():
            call.run(*arguments)
        return choice if choice in calls else ""

    monkeypatch.setattr(tune, "fastest", fastest)
    model, x = randomise(SamePadded()), torch.randn(1, 3, 17, 22)
    fast = compile(model, x, tune=True)
    assert "measured to be faster" in fast.explain().groups[-1].reason
    assert fast.explain().groups[-1].kernel == ("torch" if choice == "torch" else "halide")
    close(fast(x), model(x))
    close(fast(x[:, :, :9]), model(x[:, :, :9]))


def test_compile_tune_measures() -> None:
    model, x = randomise(SamePadded()), torch.randn(1, 3, 17, 22)
    close(compile(model, x, tune=True)(x), model(x))


@pytest.mark.usefixtures("_restored_threads")
def test_compiled_model_follows_torch_threads(model: nn.Module) -> None:
    x, seen = torch.randn(1, 3, 65, 67), []
    truth, fast, fixed = model(x), compile(model, x), compile(model, x, threads=2)
    for count in (1, 2, 1):
        torch.set_num_threads(count)
        close(fast(x), truth)
        seen.append(threads._threads.value)
        close(fixed(x), truth)
        assert threads._threads.value == 2
        assert torch.get_num_threads() == count
    assert seen == [1, 2, 1]
    assert len(fast._networks) == 2


def test_compiled_model_in_several_python_threads(model: nn.Module) -> None:
    fast = compile(model, torch.randn(1, 3, 17, 22))
    inputs = [torch.randn(1 + i % 2, 3, 40 + i, 41) for i in range(4)]
    truths, wrong = [model(x) for x in inputs], []

    def work(start: int) -> None:
        for i in range(start, start + 60):
            x, truth = inputs[i % 4], truths[i % 4]
            if not torch.allclose(fast(x), truth, rtol=1e-5, atol=1e-5):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def _in_child(fast: CompiledModel, x: Tensor, sender: Any) -> None:
    sender.send((fast(x).tolist(), fast(x[:, :, 1:]).tolist()))


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_compiled_model_after_fork(model: nn.Module) -> None:
    x = torch.randn(1, 3, 33, 34)
    fast = compile(model, x)
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_in_child, args=(fast, x, sender))
    child.start()
    assert receiver.poll(60), "the forked child did not answer"
    known, new = map(torch.tensor, receiver.recv())
    child.join()
    assert child.exitcode == 0
    close(known, model(x))
    close(new, model(x[:, :, 1:]))


def test_compiled_model_copies_but_cannot_be_pickled(model: nn.Module, compiled: CompiledModel) -> None:
    x = torch.randn(1, 3, 17, 23)
    other = copy.deepcopy(compiled)
    assert torch.equal(other(x), compiled(x))
    with pytest.raises(TypeError, match="CompiledModel: cannot be pickled; pickle the model and compile it again"):
        pickle.dumps(compiled)


def test_compiled_model_keeps_a_bounded_number_of_sizes(model: nn.Module) -> None:
    fast = compile(model, torch.randn(1, 3, 8, 8))
    for size in range(3, MAX_SIZES + 10):
        fast(torch.randn(1, 3, size, 8))
    assert len(fast._networks) == MAX_SIZES
    kept = len(fast._store._known)
    for size in range(MAX_SIZES + 10, MAX_SIZES + 20):
        fast(torch.randn(1, 3, size, 8))
    assert len(fast._store._known) <= kept
    x = torch.randn(1, 3, 3, 8)
    close(fast(x), model(x))


@pytest.mark.slow
def test_compiled_model_memory_stays_bounded_over_a_thousand_sizes(model: nn.Module) -> None:
    """Resident memory of the last 900 sizes grows by less than one plan for every ten of them would take."""
    fast, resident = compile(model, torch.randn(1, 3, 8, 8)), []
    for i in range(1000):
        fast(torch.randn(1, 3, 100 + i % 50, 100 + i // 50))
        if i in (99, 999):
            resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * 4096)
    assert resident[1] - resident[0] < 100 * 2**20


def _folded(compiled: CompiledModel) -> list[Constant]:
    [network] = [network for network in compiled._networks.values() if not isinstance(network, str)]
    groups = [part for step in network.program.steps for part in (getattr(step.group, "pointwise", None), step.group)]
    weights = [group.weight for group in groups if isinstance(group, Convolution)]
    return [weight for weight in weights if weight._again is not None]


@pytest.mark.usefixtures("_asked_anew")
def test_folded_weights_are_kept_only_where_pytorch_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    norm = nn.BatchNorm2d(8)
    model = randomise(nn.Sequential(nn.Conv2d(3, 8, 1), norm, nn.ReLU())).eval()
    x = torch.randn(2, 3, 9, 9)
    truth = model.double()(x.double()).detach()
    model.float()
    packed = compile(model, x)
    assert [weight._seen() for weight in _folded(packed)] == [None]
    _replace_first(monkeypatch, "normal", supports=lambda case: "it is Tuesday")
    _replace_first(monkeypatch, "pointwise", supports=lambda case: "it is Tuesday")
    backends.forget()
    through_pytorch = compile(model, x)
    assert [weight._seen() is None for weight in _folded(through_pytorch)] == [False]
    for compiled in (packed, through_pytorch):
        torch.testing.assert_close(compiled(x).double(), truth, rtol=1e-4, atol=1e-5)
        compiled(torch.randn(1, 3, 5, 4))  # a new size makes them again
        torch.testing.assert_close(compiled(x).double(), truth, rtol=1e-4, atol=1e-5)
