"""Concatenations and splits of channels cost nothing: kernels write and read channels of a larger image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from networks import randomise
from torch import Tensor, nn

from sepconv.compile import compile, slices
from sepconv.compile.model import CompiledModel
from sepconv.compile.network import PreparedNetwork
from sepconv.compile.program import Place
from sepconv.kernels.halide.jit import runtime

pytestmark = pytest.mark.skipif(bool(runtime.missing()), reason=runtime.missing())


class Dense(nn.Module):
    """Every layer reads all that came before it, as in DenseNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 17, 3, 2, 1)
        self.layers = nn.ModuleList(self._layer(17 + 5 * i) for i in range(3))

    @staticmethod
    def _layer(channels: int) -> nn.Module:
        before = (nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, 11, 1))
        return nn.Sequential(*before, nn.BatchNorm2d(11), nn.ReLU(), nn.Conv2d(11, 5, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        found = [self.stem(x)]
        for layer in self.layers:
            found.append(layer(torch.cat(found, 1)))
        return torch.cat(found, 1)


class Split(nn.Module):
    """Halves of an image through different layers, as in MixNet and ShuffleNet, with something added."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 34, 3, padding=1)
        self.small = nn.Conv2d(17, 17, 3, padding=1, groups=17)
        self.large = nn.Sequential(nn.Conv2d(17, 17, 5, padding=2, groups=17), nn.ReLU(), nn.Conv2d(17, 13, 1))
        self.end = nn.Conv2d(30, 30, 1)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.stem(x).chunk(2, 1)
        joined = torch.cat([self.small(left), self.large(right)], 1)
        return self.end(joined) + joined


class Inception(nn.Module):
    """Branches of every kind of kernel side by side, one of them joined itself; a pool reads the result."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.normal, self.grouped = nn.Conv2d(16, 6, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.pointwise = nn.Conv2d(16, 7, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        inner = torch.cat([self.pointwise(x), self.grouped(x)], 1)
        pooled = nn.functional.max_pool2d(x, 3, 1, 1)
        joined = torch.cat([self.normal(x), inner, pooled], 1)
        return nn.functional.avg_pool2d(joined, 3, 2, 1)


class Twice(nn.Module):
    """What is put together in two ways, once with itself, cannot lie at both places."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 9, 3), nn.Conv2d(3, 5, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, b = self.a(x), self.b(x)
        return torch.cat([a, b], 1), torch.cat([b, a], 1), torch.cat([a, a], -3)


class Mixed(nn.Module):
    """Parts that no kernel of ours writes: the image, a function of PyTorch's, a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.end = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(15, 4, 1)
        self.register_buffer("place", torch.randn(1, 1, 11, 13))

    def forward(self, x: Tensor) -> Tensor:
        place = self.place.expand(x.shape[0], 1, 11, 13)
        return self.end(torch.cat([x, self.conv(x), torch.cumsum(x, 2), place], 1))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    # Network, and how many copies remain.
    "dense": (Dense, 0),
    "split": (Split, 0),
    "inception": (Inception, 0),
    "twice": (Twice, 4),
    "mixed": (Mixed, 3),
}


class Spread(nn.Module):
    """Norm and activation behind a concatenation, as in MixNet."""

    def __init__(self, twice: bool = False) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 9, 3), nn.Conv2d(3, 5, 3, bias=False)
        self.norm, self.twice = nn.BatchNorm2d(14), twice

    def forward(self, x: Tensor) -> Tensor:
        joined = torch.cat([self.a(x), self.b(x)], 1)
        y = nn.functional.silu(self.norm(joined))
        return y + joined.mean() if self.twice else y


@pytest.mark.parametrize(("twice", "fused"), [(False, ("norm", "silu")), (True, ())])
def test_what_follows_a_join_is_done_to_its_parts(twice: bool, fused: tuple[str, ...]) -> None:
    model, x = randomise(Spread(twice)), torch.randn(1, 3, 11, 13)
    compiled = compile(model, x)
    groups = compiled.explain().groups
    assert [group.fused for group in groups if group.kind == "normal"] == [fused] * 2
    assert twice or len(groups) == 2
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)


class Shared(nn.Module):
    """The same convolution twice, with a norm that tells its results apart."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(10)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(torch.cat([self.conv(x), self.conv(x.flip(2))], 1))
        return y


def test_a_norm_behind_a_join_is_of_channels_and_not_of_weights() -> None:
    model, x = randomise(Shared()), torch.randn(1, 3, 11, 13)
    torch.testing.assert_close(compile(model, x)(x), model(x), rtol=1e-5, atol=1e-5)


def network_of(compiled: CompiledModel) -> PreparedNetwork:
    network = next(iter(compiled._networks.values()))
    assert isinstance(network, PreparedNetwork)
    return network


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", NETWORKS)
def test_channels_are_joined_and_split_in_place(name: str, batch: int) -> None:
    make, copies = NETWORKS[name]
    model = randomise(make())
    x = torch.randn(batch, 3, 11, 13)
    compiled = compile(model, x)
    kinds = Counter(group.kind for group in compiled.explain().groups)
    assert kinds.pop("copy", 0) == copies
    assert not [kind for kind in kinds if "cat" in kind]
    expected, got = model(x), compiled(x)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def numbers_of(place: Place) -> set[int]:
    """Where the numbers of a value lie in its memory."""
    form = place.form
    whole = torch.arange(place.offset + form.span)
    return set(whole.as_strided(form.shape, form.stride, place.offset).flatten().tolist())


@pytest.mark.parametrize("name", NETWORKS)
def test_no_number_is_written_twice(name: str) -> None:
    model = randomise(NETWORKS[name][0]())
    program = network_of(compile(model, torch.randn(1, 3, 11, 13))).program
    seen: dict[object, set[int]] = {}
    for step in program.steps:
        for place in step.outputs:
            written, before = numbers_of(place), seen.setdefault(place.memory, set())
            assert not written & before
            before |= written


def test_a_block_that_grows_is_one_memory() -> None:
    program = network_of(compile(randomise(Dense()), torch.randn(1, 3, 11, 13))).program
    joined = [place for step in program.steps for place in step.outputs if place.form.stride[3] == 17 + 3 * 5]
    assert len(joined) == 4
    assert len({place.memory for place in joined}) == 1
    assert [place.offset for place in joined] == [0, 17, 22, 27]


def test_early_images_run_in_turn_through_a_join(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "_MANY_CACHES", 0)
    model, x = randomise(Inception()), torch.randn(3, 3, 11, 13)
    compiled = compile(model, x)
    network = network_of(compiled)
    assert network.arena.slices == (3, len(network.program.steps))
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
