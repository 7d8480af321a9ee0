"""What people's models do that a compiler may stumble over: each gave an error or a wrong plan once."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from sepconv import depthwise_conv2d, explain
from sepconv.compile import CompiledModel, compile
from sepconv.compile.operations import _WRITE_ANY_STRIDES, operation_call
from sepconv.compile.program import Operation
from sepconv.compile.verify import disagreement
from sepconv.kernels.halide.jit import runtime
from sepconv.layers.borrowed import is_exported


class Compute(nn.Module):
    """``function(x, layers...)``."""

    def __init__(self, function: Callable[..., Any], *layers: nn.Module) -> None:
        super().__init__()
        self.function, self.layers = function, nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Any:
        return self.function(x, *self.layers)


def same(fast: CompiledModel, model: nn.Module, x: Tensor) -> None:
    """The plan computes what the model computes, at this size; nothing fell back as a whole."""
    with torch.no_grad():
        got, expected = fast(x), model(x)
    assert fast.explain().reason == ""
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def tokens_and_back(x: Tensor, linear: nn.Module, *after: nn.Module) -> Tensor:
    y: Tensor = linear(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(x.shape)
    z = y
    for layer in after:
        z = layer(z)
    return y + z


@pytest.mark.parametrize("batch", [1, 2])
def test_compile_tokens_become_an_image_again(batch: int) -> None:
    """At batch 1 the image has a step of 8 between images; its residual was copied while nothing was in it."""
    layers = nn.Linear(8, 8), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 8, 1)
    model, x = Compute(tokens_and_back, *layers).eval(), torch.randn(batch, 8, 4, 4)
    fast = compile(model, x)
    same(fast, model, x)
    same(fast, model, torch.randn(batch, 8, 4, 4))
    if not runtime.missing():
        assert [(g.kernel, g.fused) for g in fast.explain().groups if g.kind == "separable"] == [
            ("halide", ("pointwise", "add"))
        ]


def test_compile_pointwise_after_tokens_of_batch_one() -> None:
    model, x = Compute(tokens_and_back, nn.Linear(8, 8), nn.Conv2d(8, 8, 1)).eval(), torch.randn(1, 8, 4, 4)
    same(compile(model, x), model, x)


def test_compile_steps_between_images_of_batch_one_say_nothing() -> None:
    model = nn.Sequential(nn.GroupNorm(4, 16), nn.Conv2d(16, 8, 1)).eval()
    x = torch.randn(1, 16, 56, 56).to(memory_format=torch.channels_last)
    fast = compile(model, x)
    same(fast, model, x)
    if not runtime.missing():
        assert fast.explain().groups[-1].kernel == "halide"


def test_compile_group_norm_of_a_column_of_tokens() -> None:
    """PyTorch derives a layout from steps along a size of 1, and refuses its own input."""
    model = Compute(lambda x, norm: norm(torch.relu(x).transpose(1, 2).unsqueeze(3)), nn.GroupNorm(2, 136)).eval()
    x = torch.randn(1, 8, 136)
    same(compile(model, x), model, x)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("batch_first", [True, False])
def test_compile_recurrent_layers(kind: type[nn.Module], batch_first: bool) -> None:
    """Their first state is made inside and changed in place; oneDNN's LSTM does not ask for its input's strides."""
    layer = kind(8, 8, batch_first=batch_first, bidirectional=True)  # type: ignore[call-arg]
    model, x = Compute(lambda x, layer: layer(x)[0], layer).eval(), torch.randn(5, 7, 8)
    same(compile(model, x), model, x)


def _glu(x: Tensor) -> Tensor:
    a, b = x.chunk(2, 1)
    return a * b.sigmoid()


@pytest.mark.parametrize(
    "function",
    [
        _glu,
        lambda x: torch.cat([*x.split(3, 1)][::-1], 1),
        lambda x: torch.cat(x.split([1, 2, 5], 1)[1:], 1),
        lambda x: torch.stack(x.unbind(1)[1:], 1),
        lambda x: torch.cat(x.tensor_split(3, 2)[::2], 2),
        lambda x: x.hsplit(2)[0] + 1,
        lambda x: list(x.chunk(3, 3)),
    ],
    ids=["glu", "split", "split_with_sizes", "unbind", "tensor_split", "hsplit", "returned"],
)
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_compile_views_that_return_lists(function: Callable[..., Any], form: torch.memory_format) -> None:
    model, x = Compute(function).eval(), torch.randn(2, 8, 6, 6).to(memory_format=form)
    same(compile(model, x), model, x)


@pytest.mark.parametrize("size", [1, 3])
def test_compile_pooling_of_a_channels_last_input(size: int) -> None:
    """PyTorch changes the strides of its result in place; the whole model ran through PyTorch."""
    model = nn.Sequential(nn.Conv2d(8, 16, 1), nn.AdaptiveAvgPool2d(size)).eval()
    x = torch.randn(1, 8, 16, 16).to(memory_format=torch.channels_last)
    same(compile(model.to(memory_format=torch.channels_last), x), model, x)


def _overwrite(x: Tensor) -> Tensor:
    y = x * 2
    y[:, 0] = 0
    y[..., 1:].add_(x[..., :-1])
    return y.relu_()


def test_compile_changes_in_place_that_stay_inside() -> None:
    model, x = Compute(_overwrite).eval(), torch.randn(2, 8, 6, 5)
    kept = x.clone()
    same(compile(model, x), model, x)
    assert torch.equal(x, kept)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.as_strided((2, 3), (6, 1), 4),
        lambda x: x.transpose(0, 1).contiguous().as_strided((3, 2), (2, 3), 1),
        lambda x: torch.fft.rfft(x).conj().abs(),
        lambda x: torch.view_as_real(torch.complex(x, x + 1).conj().resolve_conj()),
        lambda x: (x.double() * 2).float().view(torch.int32).view(torch.float32),
    ],
    ids=["as_strided", "as_strided_of_a_copy", "conjugate", "real", "bits"],
)
def test_compile_reads_memory_as_the_model_saw_it(function: Callable[..., Any]) -> None:
    model, x = Compute(function).eval(), torch.randn(4, 6)
    same(compile(model, x), model, x)


def test_compile_as_strided_around_a_view_runs_through_pytorch() -> None:
    model, x = Compute(lambda x: x[1:].as_strided((2, 2), (6, 1), 0)).eval(), torch.randn(4, 6)
    with pytest.warns(UserWarning, match="as_strided reads the memory around a view"):
        fast = compile(model, x)
    assert torch.equal(fast(x), model(x))


class Keeps(nn.Module):
    """Computes something at its first call and keeps it, as position tables are."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.kept = nn.Parameter(torch.ones(8)), {}

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] not in self.kept:
            self.kept[x.shape[-1]] = self.weight * 2
        result: Tensor = x + self.kept[x.shape[-1]]
        return result


def test_compile_model_that_keeps_a_tensor() -> None:
    model, x = Keeps().eval(), torch.randn(2, 8)
    same(compile(model, x), model, x)
    used = Keeps().eval()
    used(x)
    fast = compile(used, x)
    same(fast, used, x)
    same(fast, used, torch.randn(3, 8))


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


@pytest.mark.parametrize("example", [torch.ones(2, 3), torch.zeros(2, 3)], ids=["ones", "zeros"])
def test_compile_model_that_counts_its_calls_starts_where_it_stood(example: Tensor) -> None:
    """Nor do zeros hide that it counts."""
    with pytest.warns(UserWarning, match="compile: the model runs through PyTorch: the captured operations give other"):
        fast = compile(Counts().eval(), example)
    assert [fast(torch.ones(2, 3))[0, 0].item() for _ in range(3)] == [1, 2, 3]


@pytest.mark.parametrize(
    ("ours", "models", "reason"),
    [
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]), ""),
        (torch.tensor([torch.nan, torch.inf, 1.0]), torch.tensor([torch.nan, torch.inf, 1.0]), ""),
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.1]), r"other results than the model \(by 0.048\)"),
        (torch.tensor([1.0, torch.inf]), torch.tensor([1.0, 2.0]), "numbers where the model gives NaN or infinity"),
        (torch.tensor([1.0, torch.inf]), torch.tensor([1.0, torch.nan]), "numbers where the model gives NaN"),
        (torch.tensor([1.0]), torch.tensor([1]), "torch.float32 of shape .* where the model gives torch.int64"),
        (torch.zeros(2, 1), torch.zeros(1, 2), "of shape "),
    ],
)
def test_disagreement(ours: Tensor, models: Tensor, reason: str) -> None:
    found = disagreement([ours], [models])
    assert re.search(reason, found) if reason else found == ""


def _pruned() -> nn.Module:
    conv = nn.Conv2d(8, 8, 1)
    prune.l1_unstructured(conv, "weight", 0.5)
    return conv


def _old_weight_norm() -> nn.Module:
    with pytest.warns(FutureWarning):
        normed: nn.Module = torch.nn.utils.weight_norm(nn.Conv2d(8, 8, 1))
    return normed


def _traced() -> nn.Module:
    traced: nn.Module = torch.jit.trace(nn.Conv2d(8, 8, 1).eval(), torch.randn(1, 8, 5, 5))
    return traced


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:DeprecationWarning", "ignore:.*treespec, LeafSpec")
@pytest.mark.parametrize(
    "make",
    [
        _pruned,
        _old_weight_norm,
        _traced,
        lambda: parametrizations.weight_norm(nn.Conv2d(8, 8, 1)),
        lambda: torch.compile(nn.Conv2d(8, 8, 1).eval()),
        lambda: torch.export.export(nn.Conv2d(8, 8, 1).eval(), (torch.randn(1, 8, 5, 5),)).module(),
        lambda: torch.fx.symbolic_trace(nn.Conv2d(8, 8, 1).eval()),
    ],
    ids=["pruned", "old_weight_norm", "traced", "weight_norm", "torch_compiled", "exported", "fx"],
)
def test_compile_special_modules(make: Callable[[], Any]) -> None:
    conv, x = make(), torch.randn(1, 8, 5, 5)
    if not is_exported(conv):
        conv.eval()
    expected = conv(x).detach()
    fast = compile(conv, x)
    assert fast.explain().reason == ""
    torch.testing.assert_close(fast(x), expected, rtol=1e-4, atol=1e-5)


def test_compile_asks_to_call_a_lazy_module_first() -> None:
    with pytest.raises(ValueError, match=r"compile: weight has no size yet; call the model once"):
        compile(nn.LazyConv2d(8, 1).eval(), torch.randn(1, 8, 5, 5))


class Stubborn(nn.Conv2d):
    def __deepcopy__(self, memo: Any) -> Any:
        raise RuntimeError("holds a file that is open")


def test_compile_model_that_cannot_be_copied_runs_itself() -> None:
    model, x = Stubborn(8, 8, 1).eval(), torch.randn(1, 8, 5, 5)
    with pytest.warns(
        UserWarning,
        match=r"the model \(Stubborn\) cannot be copied .*holds a file that is open.*; later changes to it count",
    ):
        fast = compile(model, x)
    with torch.no_grad():
        assert torch.equal(fast(x), model(x))


def test_compile_says_that_hooks_do_not_run_later() -> None:
    model, seen = nn.Sequential(nn.Conv2d(8, 8, 1)).eval(), []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output))
    with pytest.warns(UserWarning, match="compile: 0 has forward hooks: they run while a new input size is prepared"):
        fast = compile(model, torch.randn(1, 8, 5, 5))
    before = len(seen)
    fast(torch.randn(1, 8, 5, 5))
    assert len(seen) == before


def test_compile_draws_no_random_numbers_from_the_caller() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)).eval(), torch.randn(1, 3, 8, 8)
    before = torch.get_rng_state()
    fast = compile(model, x, tune=True)
    fast.explain(measure=True)
    fast(torch.ones(2, 3, 8, 8))
    assert torch.equal(torch.get_rng_state(), before)


def test_compile_with_tuning_leaves_constants_alone() -> None:
    """Groups that read a parameter were measured on random numbers, which were written into it."""
    position = nn.Parameter(torch.ones(4, 8))

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.position = nn.Linear(8, 8), position

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.linear(x) + self.position
            return y

    model, x = Positions().eval(), torch.randn(4, 8)
    fast = compile(model, x, tune=True)
    same(fast, model, x)
    assert torch.equal(position, torch.ones(4, 8))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.softmax(1), lambda x: x.log_softmax(2), lambda x: x.tril(), lambda x: x.cumsum(1),
        lambda x: x.sort(1)[0],
    ],
    ids=["softmax", "log_softmax", "tril", "cumsum", "sort"],
)  # fmt: skip
def test_compile_operations_along_a_dimension(function: Callable[..., Any]) -> None:
    """PyTorch's softmax and tril write wrong numbers into a channels_last output that they are given."""
    model, x = Compute(lambda x, conv: function(conv(x)), nn.Conv2d(8, 8, 3)).eval(), torch.randn(2, 8, 9, 9)
    same(compile(model, x), model, x)


def test_outputs_of_any_strides_are_written_right() -> None:
    x = torch.randn(2, 8, 6, 6).to(memory_format=torch.channels_last)
    aten, i = torch.ops.aten, torch.tensor([1, 0, 3])
    calls = {
        aten.cat.default: ([x, x], 1), aten.mean.dim: (x, [2, 3], True), aten.sum.dim_IntList: (x, [1], True),
        aten.amax.default: (x, [1], True), aten.amin.default: (x, [2], True), aten.avg_pool2d.default: (x, [2, 2]),
        aten.adaptive_avg_pool2d.default: (x, [3, 3]), aten.upsample_nearest2d.default: (x, [9, 11]),
        aten.upsample_bilinear2d.default: (x, [9, 11], False), aten.upsample_bicubic2d.default: (x, [9, 11], False),
        aten.reflection_pad2d.default: (x, [1, 2, 0, 1]), aten.replication_pad2d.default: (x, [1, 2, 0, 1]),
        aten.glu.default: (x, 1), aten.index_select.default: (x, 1, i), aten.mm.default: (x[0, 0], x[1, 1]),
        aten.bmm.default: (x[0], x[1]), aten.addmm.default: (x[0, 2], x[0, 0], x[1, 1]),
        aten.baddbmm.default: (x[0], x[0], x[1]),
    }  # fmt: skip
    assert {op.overloadpacket.__name__ for op in calls} == set(_WRITE_ANY_STRIDES)
    for op, args in calls.items():
        expected = op(*args)
        strides = torch.empty(expected.shape[::-1]).permute(*range(expected.dim())[::-1]).stride()
        out = torch.empty_strided(expected.shape, strides).fill_(torch.nan)
        operation_call(Operation(op, args), [], [out])()
        torch.testing.assert_close(out, expected, msg=str(op))


def test_compiled_model_computes_alike_under_autocast() -> None:
    model, x = nn.Sequential(nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 3), nn.Softmax(1)).eval(), torch.randn(1, 8, 9, 9)
    fast = compile(model, x)
    expected = fast(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fast(x), expected)
        assert fast(x).dtype is torch.float32
        other = fast(torch.ones(2, 8, 9, 9))
    assert torch.equal(other, fast(torch.ones(2, 8, 9, 9)))


def test_compile_and_functions_agree_where_two_kernels_are_faster() -> None:
    """One rule for both: nine columns are too wide for the fused kernel."""
    block = nn.Sequential(nn.Conv2d(8, 8, 9, padding=4, groups=8), nn.Conv2d(8, 8, 1)).eval()
    x = torch.randn(1, 8, 12, 12)
    fast = compile(block, x)
    same(fast, block, x)
    if not runtime.missing():
        (group,) = [group for group in fast.explain().groups if group.kind == "separable"]
        assert group.kernel == "halide"
        assert "filters wider than 7 columns are faster in the depthwise kernel" in group.reason


def test_compile_leaves_to_pytorch_what_the_functions_leave_to_it() -> None:
    """Taps that lie far apart would have whole images copied for a few results."""
    conv, x = nn.Conv2d(8, 8, 3, padding=60, dilation=60, groups=8).eval(), torch.randn(1, 8, 130, 130)
    fast = compile(conv, x)
    same(fast, conv, x)
    if not runtime.missing():
        (group,) = [group for group in fast.explain().groups if group.kind == "depthwise"]
        assert group.kernel == "torch"
        image = x.to(memory_format=torch.channels_last)  # as the plan has it
        alone = explain(depthwise_conv2d, image, conv.weight, conv.bias, padding=60, dilation=60)[0]
        assert "the taps lie so far apart" in group.reason
        assert alone.reasons["halide"] == group.reason
