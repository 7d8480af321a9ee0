"""Passes that go on where they stopped: the same values as from the beginning, and as many steps as the network has."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from convertible import NETWORKS, Residual, conv, convert, images, trained
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from sepconv.convert import conversion, frontier
from sepconv.convert.course import Courses
from sepconv.convert.frontier import Frontier, follow
from sepconv.convert.outputs import tensors
from sepconv.convert.passes import calls
from sepconv.convert.sites import find_sites, record
from sepconv.leaves import Inputs


class Network(nn.Module):
    """Three convolutions of equal channels behind a first one, and a function that says how they are called."""

    def __init__(self, forward: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.c = conv(3, 6), conv(6, 6), conv(6, 6), conv(6, 6)
        self.judge, self.teller, self.opener, self.keeper = Judge(), Teller(), Opener(), Keeper()
        self.calls = forward

    def forward(self, x: Tensor) -> Any:
        return self.calls(self, self.stem(x) * 1.5)


class Judge(nn.Module):
    """No convolution lies in it, so that its Python may do what it likes."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if isinstance(x, Tensor) and float(x.detach().mean()) > 0 else x.add_(1)


class Teller(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        return x, 2


@dataclass
class Box:
    x: Tensor


class Opener(nn.Module):
    def forward(self, box: Box) -> Tensor:
        return box.x


class Keeper(nn.Module):
    def forward(self, x: Tensor) -> None:
        self.kept = x * 2


def in_place(net: Network, x: Tensor) -> Tensor:
    view = x[:, :3]
    x = net.a(x).add_(x)
    view.mul_(0.5)
    x += net.b(x)
    return net.c(torch.cat([view, x[:, 3:]], 1))


def interleaved(net: Network, x: Tensor) -> Tensor:
    for _ in range(2):
        x = net.a(x).mul_(0.8)
        x = net.b(x).relu_() + x.mul_(0.5)
    return net.c(x)


def changed_between_calls(net: Network, x: Tensor) -> dict[str, Tensor]:
    y = net.a(x)
    x.add_(y)
    y = net.a(x)
    return {"both": y + net.c(net.b(x))}


def recurrent(net: Network, x: Tensor) -> dict[str, Tensor]:
    for _ in range(2):
        x = net.b(net.a(x).relu_()).relu_() + x
    return {"x": net.c(input=x), "loss": x.square().mean()}


def judged(net: Network, x: Tensor) -> list[Tensor]:
    return [net.c(net.judge(net.b(net.judge(net.a(x)))))]


def of_sizes(net: Network, x: Tensor) -> Tensor:
    x = net.a(x).mT[..., : x.shape[-1] // 2]
    return net.c(net.b(x).reshape(x.shape[0], 6, -1, 1) + torch.arange(6.0)[:, None, None])


def branches(net: Network, x: Tensor) -> Tensor:
    first, second = torch.cat([net.a(x).relu_(), net.b(x)], 1).chunk(2, 1)
    return net.c(first) * second + x


def by_type_and_size(net: Network, x: Tensor) -> Tensor:
    if not isinstance(x, Tensor) or min(x.shape[2:]) < 3 or len(x) == 0 or x.dtype != torch.float64:
        raise ValueError(f"{x.dim()} dimensions")
    first, *rest = net.b(net.a(x)).split(2, dim=1)
    for part in rest:
        first = first + part[:, :, slice(None, None, 1), ...]
    return net.c(torch.cat([first] * 3, 1))


CONVERTED = {f.__name__: f for f in (recurrent, judged, of_sizes, branches, by_type_and_size)}
FOLLOWED = CONVERTED | {f.__name__: f for f in (in_place, interleaved, changed_between_calls)}


def by_value(net: Network, x: Tensor) -> Tensor:
    x = net.a(x)
    return net.c(net.b(x) if float(x.detach().mean()) < 1e9 else x)


def swallowing(net: Network, x: Tensor) -> Tensor:
    try:
        factor = 2.0 if float(x.detach().sum()) > -1e9 else 1.0
    except Exception:
        factor = 1.0
    return net.c(net.b(net.a(x)) * factor)


def through_numpy(net: Network, x: Tensor) -> Tensor:
    return net.c(net.b(net.a(x)) * float(x.detach().numpy().size))


def telling(net: Network, x: Tensor) -> Tensor:
    x, size = net.teller(net.a(x))
    return net.c(net.b(x)) * size


def passing(net: Network, x: Tensor) -> Tensor:
    return net.c(net.b(net.opener(Box(net.a(x)))))


def drawing(net: Network, x: Tensor) -> Tensor:
    return net.c(net.b(net.a(x) + torch.randn_like(x)))


def kept_elsewhere(net: Network, x: Tensor) -> Tensor:
    net.keeper(net.a(x))
    return net.c(net.b(net.keeper.kept))


UNFOLLOWED = {
    by_value: r"its code looks at values \(__float__\)",
    swallowing: r"its code looks at values \(__float__\)",
    through_numpy: r"its code looks at values \(numpy\)",
    telling: "layer 'teller' returns int",
    passing: "a call is given Box",
    drawing: "it is not the same in every pass",
    kept_elsewhere: "it uses a tensor of unknown origin",
}


def make(forward: Callable[[Any, Tensor], Any]) -> nn.Module:
    torch.manual_seed(2)
    return Network(forward).double().eval()


def of_all(model: nn.Module, **arguments: Any) -> tuple[dict[str, Tensor], list[str]]:
    new, plan = convert(model, images(20, 7), sweeps=0, **arguments)
    return new.state_dict(), plan.notes


def check_equal(model: nn.Module, monkeypatch: pytest.MonkeyPatch, **arguments: Any) -> None:
    found, notes = of_all(model, **arguments)
    assert notes == []
    monkeypatch.setattr(conversion, "follow", lambda model, sites, _: Courses(model, sites, "as asked"))
    wanted, notes = of_all(model, **arguments)
    assert notes == ["slower: the model ran from its beginning for each layer; not followed: as asked"]
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("arguments", [{"depth_multiplier": 1}, {"budget": 0.6}], ids=["fixed", "budget"])
@pytest.mark.parametrize("name", CONVERTED)
def test_networks_are_converted_as_from_the_beginning(
    name: str, arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    check_equal(make(CONVERTED[name]), monkeypatch, **arguments)


@pytest.mark.parametrize("form", ["separable", "bottleneck"])
@pytest.mark.parametrize("name", NETWORKS)
def test_usual_networks_are_converted_as_from_the_beginning(
    name: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_equal(trained(NETWORKS[name]), monkeypatch, form=form, depth_multiplier=1)


@pytest.mark.parametrize(("forward", "reason"), UNFOLLOWED.items(), ids=lambda given: getattr(given, "__name__", ""))
def test_what_cannot_be_followed_runs_from_the_beginning_and_the_plan_says_so(
    forward: Callable[[Any, Tensor], Any], reason: str
) -> None:
    model = make(forward)
    new, plan = convert(model, images(), depth_multiplier=9)
    (note,) = plan.notes
    assert re.fullmatch(f"slower: .*; not followed: {reason}", note), note
    if forward is not drawing:
        torch.testing.assert_close(new(images()), model(images()))


def test_what_strays_from_its_course_runs_from_the_beginning() -> None:
    """Which images go through a layer depends on them: in two batches of one shape not as many."""

    def which(x: Tensor) -> Tensor:
        return x.mean((1, 2, 3)) > -0.06

    model, x = make(lambda net, x: net.c(x) + net.b(net.a(x)[which(x)]).mean()), images(273, 7)
    fitted = x[torch.arange(273) % 16 != 15]  # two batches of one shape; the others are held out
    first, second = (int(which(model.stem(part) * 1.5).sum()) for part in fitted.split(128))
    assert first != second
    new, plan = convert(model, x, depth_multiplier=9)
    assert plan.notes[0].endswith("results of __getitem__ have other shapes on other images")
    torch.testing.assert_close(new(x), model(x))


def test_following_leaves_the_model_as_it_is() -> None:
    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.seen = conv(3, 4), None

        def forward(self, x: Tensor) -> Tensor:
            self.seen = self.conv(x)
            return self.seen * torch.ones(3)

    model, x = Keeps(), images(2, 3, torch.float32)
    sites = record(model, find_sites(model), Inputs.of(x))
    courses = follow(model, sites, Inputs.of(x))
    assert courses.reason == ""
    assert isinstance(model.seen, Tensor)
    assert not model.conv._forward_hooks


@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize("name", FOLLOWED)
def test_calls_and_outputs_are_those_of_a_whole_pass_in_any_order(name: str, fixed: bool) -> None:
    model, x = make(FOLLOWED[name]).requires_grad_(False), images(5)
    sites = record(model, find_sites(model), Inputs.of(x))
    courses = follow(model, sites, Inputs.of(x[:2]))
    assert courses.reason == ""
    walk = Frontier(model, courses, fixed)
    for site in (*sites, *reversed(sites)):
        for number, batch in enumerate(map(Inputs.of, x.split(3))):
            wanted = calls(model, site.conv, batch, site.calls)
            torch.testing.assert_close(walk.calls(number, batch, site), wanted, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(
            walk.outputs(0, Inputs.of(x[:3]), site), tensors(model(x[:3])), rtol=1e-12, atol=1e-12
        )


def test_values_are_held_up_to_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two batches fit with one map of six channels each, one fits with two: the second layer in the loop needs both."""
    model, x = make(recurrent), images(6)
    sites = record(model, find_sites(model), Inputs.of(x))
    courses = follow(model, sites, Inputs.of(x[:2]))
    assert courses.reason == ""
    monkeypatch.setattr(frontier, "HELD_BYTES", 3 * 6 * 13 * 13 * 8 * 3)
    assert courses.of(Inputs.of(x[:3])) is not None
    runs, walk = [0, 0], Frontier(model, courses, fixed=False)
    for site in sites:
        for number, batch in enumerate(map(Inputs.of, x.split(3))):
            handle = model.stem.register_forward_hook(lambda *_, n=number: runs.__setitem__(n, runs[n] + 1))
            walk.calls(number, batch, site)
            handle.remove()
    # The first layer is run to be looked at, then in the place of what it becomes; the second batch begins once more.
    assert runs == [2, 3]


def executions(depth: int, block: Callable[[], nn.Module], **arguments: Any) -> int:
    """Calls of modules in a conversion of so many blocks."""
    torch.manual_seed(0)
    model = nn.Sequential(conv(3, 8), *[block() for _ in range(depth)]).double().eval()
    count = 0

    def counted(*_: object) -> None:
        nonlocal count
        count += 1

    handle = register_module_forward_hook(counted)
    try:
        convert(model, images(20, 5), depth_multiplier=1, sweeps=0, **arguments)
    finally:
        handle.remove()
    return count


BLOCKS = {"plain": lambda: nn.Sequential(conv(8, 8), nn.ReLU(inplace=True)), "residual": lambda: Residual(8, 8, 1)}


@pytest.mark.parametrize("method", ["sequential", "least_squares"])
@pytest.mark.parametrize("block", BLOCKS)
def test_executions_grow_linearly_with_depth(block: str, method: str) -> None:
    few, more, most = (executions(depth, BLOCKS[block], method=method) for depth in (1, 2, 3))
    assert most - more == more - few
