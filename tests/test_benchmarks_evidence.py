"""The runner does a step once and in order; the rivals are what they say; verdicts follow from numbers."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from convertible import convert
from torch import nn

from benchmarks import record
from benchmarks.evidence import between, claims, rivals, runner, students, verdicts
from benchmarks.evidence.__main__ import chosen
from benchmarks.evidence.runner import Step
from benchmarks.evidence.summary import plus_minus, table
from sepconv.cost import count
from sepconv.layers import SeparableConv2d
from sepconv.models import create

MULTIPLIERS = (1, 2, 9)


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(runner, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(runner.time, "sleep", lambda seconds: pytest.fail("nothing is being done elsewhere"))
    return tmp_path


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return create("vgg_quick", width_mult=0.25).eval()


def test_steps_run_once_and_after_what_they_need(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done: list[str] = []

    def step(name: str, *needs: str) -> Step:
        return Step(name, lambda folder: {"order": done.append(name) or len(done), "at": folder.name}, needs)

    steps = [step("c", "b"), step("a"), step("b", "a")]
    runner.run(steps)
    assert done == ["a", "b", "c"]
    runner.run(steps)
    assert done == ["a", "b", "c"]
    assert {name: runner.read(name)["order"] for name in "abc"} == {"a": 1, "b": 2, "c": 3}
    assert runner.read("c")["at"] == "c"
    assert "a begins" in capsys.readouterr().out


def test_a_step_that_fails_leaves_no_record_and_is_done_again(folders: Path) -> None:
    def fail(folder: Path) -> dict[str, Any]:
        (folder / "half").write_text("done")
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        runner.run([Step("a", fail)])
    assert not runner.finished("a")
    runner.run([Step("a", lambda folder: {"found": (folder / "half").read_text()})])
    assert runner.read("a")["found"] == "done"


def test_a_step_in_the_hands_of_another_process_is_left_to_it(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = folders / "runs" / "a" / "lock"
    lock.parent.mkdir(parents=True)

    def other_finishes(seconds: float) -> None:
        record.save("evidence-a", {"by": "the other"})

    monkeypatch.setattr(runner.time, "sleep", other_finishes)
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        runner.run([Step("a", lambda folder: pytest.fail("done twice"))])
    assert runner.read("a") == {"by": "the other"}


def test_names_choose_steps_and_their_order() -> None:
    steps = [Step(name, lambda folder: {}) for name in ("a-1", "b-1", "a-2", "c")]
    assert [s.name for s in chosen(steps, ["c", "a-2", "a"])] == ["c", "a-2", "a-1"]
    assert chosen(steps, []) == steps


def relative_error(conv: nn.Conv2d, other: nn.Module) -> float:
    x = torch.randn(2, conv.in_channels, 7, 7, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = conv(x)
        return float((other(x) - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("make", [rivals.depthwise_first_svd, rivals.pointwise_first_svd])
def test_both_orders_come_closer_with_m_and_are_exact_at_full_rank(network: nn.Module, make: Any) -> None:
    conv = dict(rivals.convolutions(network))["stages.1.1.0"]
    errors = [relative_error(conv, make(conv, m)) for m in MULTIPLIERS]
    assert errors[0] > errors[1] > 0.1
    assert errors[2] < 1e-5


def test_depthwise_first_is_what_convert_does(network: nn.Module) -> None:
    ours = rivals.replaced(network, lambda conv: rivals.depthwise_first_svd(conv, 2))
    theirs, _ = convert(network, None, method="svd", depth_multiplier=2, skip=["stem"])
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        # The closed form of convert weighs outputs by their batch norms, which does not change the projection at M = k.
        full = rivals.replaced(network, lambda conv: rivals.depthwise_first_svd(conv, 9))
        torch.testing.assert_close(full(x), network(x), rtol=1e-3, atol=1e-4)
    assert count(ours, (3, 32, 32)).conv_params == count(theirs, (3, 32, 32)).conv_params


@pytest.mark.parametrize("make", [rivals.tucker, rivals.canonical])
def test_tucker_and_cp_keep_to_their_weights_and_improve(network: nn.Module, make: Any) -> None:
    conv = dict(rivals.convolutions(network))["stages.1.0.0"]
    limits = [rivals.separable_weights(conv, m) for m in MULTIPLIERS]
    found = [make(conv, limit) for limit in limits]
    for module, limit in zip(found, limits, strict=True):
        assert 0.7 * limit < sum(p.numel() for p in module.parameters()) <= limit
    errors = [relative_error(conv, module) for module in found]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.5


def test_pointwise_first_fits_on_images_better_than_from_weights(network: nn.Module) -> None:
    images = torch.randn(96, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    fitted = rivals.pointwise_first_sequential(network, images, 1)
    closed = rivals.replaced(network, lambda conv: rivals.pointwise_first_svd(conv, 1))
    with torch.no_grad():
        wanted = network(images)
        errors = [float((new(images) - wanted).norm() / wanted.norm()) for new in (fitted, closed)]
    assert errors[0] < 0.6 * errors[1]


def test_forgotten_is_the_same_network_with_other_weights(network: nn.Module) -> None:
    before = {name: value.clone() for name, value in network.state_dict().items()}
    fresh = students.forgotten(create("vgg_quick", width_mult=0.25), seed=3)
    assert fresh.state_dict().keys() == before.keys()
    assert not torch.equal(fresh.state_dict()["stages.1.1.0.weight"], before["stages.1.1.0.weight"])
    assert not fresh.state_dict()["stem.0.bias"].any()


@pytest.mark.parametrize("data", list(claims.RECIPES))
def test_claims_compare_what_they_say(data: str) -> None:
    by_key = {claim.key: claim for claim in claims.claims(data)}
    assert by_key.keys() == verdicts.VERDICTS.keys()
    found = type("Found", (), {"channels": 1, "num_classes": 10, "input_shape": (1, 28, 28)})()

    def cost(key: str, number: int) -> Any:
        named = {v.name: v for v in by_key[key].variants}
        return count(claims.build(by_key[key].variants[number], named, found), (1, 28, 28))

    assert cost("shape", 1).conv_params < cost("shape", 0).conv_params / 5
    assert cost("weights", 1).conv_params == pytest.approx(cost("weights", 0).conv_params, rel=0.03)
    assert cost("reduction", 1).macs < cost("reduction", 0).macs / 2
    for number in (1, 2):
        assert cost("stack", number).conv_params == pytest.approx(cost("stack", 0).conv_params, rel=0.05)


def test_equal_networks_share_a_key_and_others_do_not() -> None:
    every = [variant for claim in claims.claims("fashion") for variant in claim.variants]
    normal, separable = every[:2]
    same = [v.name for v in every if v.key == separable.key]
    assert same == ["separable", "1 pointwise layer", "width 1.0"]
    assert len({v.key for v in every}) == len(every) - 3
    assert normal.key != separable.key


def rows(**accuracies: list[float]) -> dict[str, list[dict[str, Any]]]:
    return {
        name: [{"variant": name, "seed": s, "accuracy": a, "conv_params": 100, "macs": i} for s, a in enumerate(values)]
        for i, (name, values) in enumerate(accuracies.items())
    }


@pytest.mark.parametrize(
    ("better", "verdict"),
    [([0.6, 0.7, 0.8], "confirmed"), ([0.3, 0.4, 0.51], "refuted"), ([0.6, 0.5, 0.7], "not confirmed")],
)
def test_more_accurate_needs_two_standard_errors(better: list[float], verdict: str) -> None:
    assert verdicts.more_accurate(rows(a=[0.5, 0.6, 0.7], b=better)).startswith(verdict + ":")


def test_cheaper_needs_both_the_saving_and_the_accuracy() -> None:
    found = rows(a=[0.5, 0.6], b=[0.49, 0.59])
    found["a"][0]["macs"] = 100
    found["b"][0] |= {"conv_params": 25, "macs": 20}
    assert verdicts.cheaper(found).startswith("confirmed: 1/4.0 of the weights, 1/5.0 of the multiply-adds")
    found["b"][0]["conv_params"] = 60
    assert verdicts.cheaper(found).startswith("not confirmed")
    found["b"][0] |= {"conv_params": 25, "accuracy": 0.3}
    assert verdicts.cheaper(found).startswith("not confirmed")


def test_monotone_looks_at_every_step() -> None:
    assert verdicts.monotone(rows(a=[0.5], b=[0.6], c=[0.7])).startswith("confirmed: from step to step +10.00, +10.00")
    assert verdicts.monotone(rows(a=[0.5], b=[0.7], c=[0.6])).startswith("not confirmed")


def test_tables() -> None:
    assert plus_minus([0.5]) == "50.00 %"
    assert table(["a", "b"], []) == ""
    assert table(["a", "b"], [["x", "1"]]) == "| a | b |\n| --- | ---: |\n| x | 1 |\n"


def test_records_carry_no_paths_of_a_machine() -> None:
    for path in record.RESULTS.glob("evidence-*.json"):
        text = path.read_text()
        assert json.loads(text)["step"] == path.stem.removeprefix("evidence-")
        assert "/home" not in text
        assert "/root" not in text
        assert "/work" not in text


@pytest.mark.parametrize("change", [between.norm, between.activation])
def test_what_is_put_between_the_layers_starts_as_nothing(network: nn.Module, change: Any) -> None:
    images = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    new, _ = convert(network, None, method="svd", depth_multiplier=1)
    with torch.no_grad():
        wanted = new.eval()(images)
        changed = change(new, images)
        layers = [m for m in changed.modules() if isinstance(m, SeparableConv2d)]
        assert len(layers) == 7
        assert all(isinstance(m.depthwise_norm, nn.Module) for m in layers)
        torch.testing.assert_close(changed(images), wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))
