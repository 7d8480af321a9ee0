"""Training and evaluation without classes: a student learns to give a teacher's outputs, from anybody's batches."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from sepconv.data import Data, LoaderSplit, load
from sepconv.leaves import Closeness
from sepconv.train import Distillation, Metrics, Progress, Recipe, evaluate, train
from sepconv.train.matching import OutputMatch

RECIPE = Recipe(epochs=3, batch_size=7, lr=0.02, weight_decay=0.0, optimizer="adamw")


class Heads(nn.Module):
    """Two signals in, a dict of outputs of very different sizes out."""

    def __init__(self, channels: int = 6) -> None:
        super().__init__()
        self.body = nn.Conv1d(2, channels, 5, padding=2)
        self.large, self.small = nn.Conv1d(channels, 3, 1), nn.Conv1d(channels, 1, 1)

    def forward(self, left: Tensor, right: Tensor) -> dict[str, Any]:
        y = torch.tanh(self.body(torch.stack([left, right], 1)))
        return {"large": 100 * self.large(y), "rest": [self.small(y).mean(2), "name"]}


class Log(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.log()


def batches(count: int = 6) -> list[dict[str, Tensor]]:
    random = torch.Generator().manual_seed(0)
    return [{name: torch.randn(7, 11, generator=random) for name in ("left", "right")} for _ in range(count)]


def networks() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    teacher = Heads()
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return student, teacher


def test_the_loss_is_each_output_over_its_variance() -> None:
    torch.manual_seed(0)
    wanted = {"a": torch.randn(50, 3) * 100 + 7, "b": torch.randn(50)}
    given = {"a": wanted["a"] + 10, "b": wanted["b"] + 0.2}
    match = OutputMatch(wanted, given, None)
    parts = [
        float((wanted[k] - given[k]).square().mean() / (wanted[k] - wanted[k].mean(0)).square().mean()) for k in "ab"
    ]
    assert match(given, wanted).item() == pytest.approx(sum(parts) / 2, rel=1e-5)
    weighted = OutputMatch(wanted, given, {"a": 3.0})
    assert weighted(given, wanted).item() == pytest.approx((3 * parts[0] + parts[1]) / 4, rel=1e-5)
    with pytest.raises(ValueError, match=r"train: the teacher's output holds no floating point tensor \(dict\)"):
        OutputMatch({"n": torch.ones(1).long()}, {}, None)
    with pytest.raises(
        ValueError, match=r"train: the outputs of the model change their shapes .* where the teacher is"
    ):
        OutputMatch(wanted, {"a": wanted["a"][:1], "b": wanted["b"]}, None)


def test_a_student_learns_all_outputs_from_a_loader(tmp_path: Path) -> None:
    student, teacher = networks()
    before = evaluate(student, batches(), teacher=teacher)
    assert isinstance(before, Closeness)
    assert [leaf.name for leaf in before.leaves] == ["large", "rest.0"]
    seen: list[Progress] = []
    val = batches(2)
    history = train(student, batches(), RECIPE, tmp_path, teacher=teacher, val=val, on_progress=seen.append)
    after = evaluate(student, val, teacher=teacher)
    assert history.error == pytest.approx(after.relative_error)
    assert after.relative_error < 0.5 * evaluate(networks()[0], val, teacher=teacher).relative_error
    assert all(leaf.relative_error < b.relative_error for leaf, b in zip(after.leaves, before.leaves, strict=True))
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [sorted(row) for row in rows] == [
        sorted(("epoch", "step", "lr", "train_loss", "test_error", "seconds", "cpu_seconds", "images_per_second"))
    ] * 3
    assert {(step.accuracy, step.test_accuracy) for step in seen} == {(None, None)}
    assert seen[-1].test_error == history.error
    assert len(seen) == 3 * (6 + 1)


def test_a_run_of_batches_goes_on_to_the_bit(tmp_path: Path) -> None:
    whole, teacher = networks()
    train(whole, batches(), RECIPE, teacher=teacher)
    parts, _ = networks()

    def stop(step: Progress) -> None:
        if step.epoch == 2 and step.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(parts, batches(), RECIPE, tmp_path, teacher=teacher, on_progress=stop)
    parts, _ = networks()
    assert train(parts, batches(), RECIPE, tmp_path, teacher=teacher, resume=True).resumed_from == 1
    for (name, a), b in zip(whole.state_dict().items(), parts.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_run_of_shuffled_classes_goes_on(tmp_path: Path) -> None:
    """The first batch of a loader that shuffles has now these classes and then those, and perhaps another size."""
    images, labels = torch.randn(6, 3), torch.arange(6)
    batches = [(images[part], labels[part]) for part in labels.split((1, 2, 3))]
    recipe = Recipe(epochs=2, lr=0.01)

    def stop(step: Progress) -> None:
        if step.epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(nn.Linear(3, 6), batches, recipe, tmp_path, on_progress=stop)
    assert train(nn.Linear(3, 6), batches[::-1], recipe, tmp_path, resume=True).resumed_from == 1
    with pytest.raises(ValueError, match=r"of another run \(data.batches is 3 there and 2 here\)"):
        train(nn.Linear(3, 6), batches[1:], recipe, tmp_path, resume=True)


def test_weights_and_features_count() -> None:
    errors = {}
    for name, other in (("large", "rest.0"), ("rest.0", "large")):
        student, teacher = networks()
        train(student, batches(), RECIPE, teacher=teacher, distillation=Distillation(output_weights={other: 0}))
        found = evaluate(student, batches(), teacher=teacher)
        errors[name] = {leaf.name: leaf.relative_error for leaf in found.leaves}
    assert errors["large"]["large"] < errors["rest.0"]["large"]
    assert errors["rest.0"]["rest.0"] < errors["large"]["rest.0"]
    losses = []
    for weight in (0.0, 5.0):
        student, teacher = networks()
        settings = Distillation(features=[("body", "body")], feature_weight=weight)
        losses.append(
            train(student, batches(), RECIPE, teacher=teacher, distillation=settings).records[0]["train_loss"]
        )
    assert losses[1] > losses[0]


def test_classes_in_a_loader_count_as_those_of_a_data_set(data: Data) -> None:
    torch.manual_seed(0)
    images, labels = next(data.train.batches(len(data.train)))
    loader = DataLoader(TensorDataset(images, labels), batch_size=20)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 5))
    history = train(model, loader, Recipe(epochs=2, lr=0.1), val=data.test)
    assert history.accuracy == evaluate(model, data.test).accuracy
    tests = DataLoader(TensorDataset(*next(data.test.batches(99))), batch_size=4)
    found = evaluate(model, tests)
    assert isinstance(found, Metrics)
    assert found.accuracy == history.accuracy
    assert int(found.confusion.sum()) == len(data.test)
    # Without one row of numbers for the classes, the teacher's outputs are what is learnt.
    maps = nn.Conv2d(1, 2, 3)
    assert "test_error" in train(maps, loader, Recipe(epochs=1, lr=0.01), teacher=nn.Conv2d(1, 2, 3)).records[0]


def test_images_without_classes_are_augmented_and_held_out(tmp_path: Path) -> None:
    digits = load("digits", labelled=False, test_fraction=0.9)
    torch.manual_seed(0)
    teacher, student = (nn.Conv2d(1, 2, 3, padding=1) for _ in range(2))
    history = train(
        student,
        digits,
        Recipe(epochs=8, batch_size=16, lr=0.1, optimizer="adamw", flip=True, crop_padding=1),
        teacher=teacher,
    )
    assert history.error < 0.1


@pytest.mark.parametrize("dims", [1, 3])
def test_volumes_and_signals_have_no_channels_last(dims: int) -> None:
    kind: Any = {1: nn.Conv1d, 3: nn.Conv3d}[dims]
    torch.manual_seed(0)
    student, teacher = kind(1, 2, 3), kind(1, 2, 3)
    x = torch.randn(10, 1, *[7] * dims)
    history = train(student, [x], Recipe(epochs=20, lr=0.1, weight_decay=0), teacher=teacher)
    assert history.error < 0.5 * history.records[0]["test_error"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "train: the data has no classes: give a teacher"),
        ({"recipe": Recipe(flip=True), "teacher": Heads()}, "flips, crops, cutout and mixing are for data sets of im"),
        ({"teacher": Heads(), "distillation": Distillation(output_weights={"x": 1})}, "output_weights names 'x', but"),
        ({"data": [torch.randn(2, 11)], "teacher": Heads()}, r"does not take images of shape \(2, 11\): .*'right'"),
        ({"data": []}, "the loader gives no batch"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: dict[str, Any], message: str) -> None:
    given = {"data": batches(1), "recipe": RECIPE, **arguments}
    with pytest.raises(ValueError, match=message):
        train(Heads(), given.pop("data"), given.pop("recipe"), **given)


def test_evaluation_needs_labels_or_a_teacher() -> None:
    with pytest.raises(ValueError, match="evaluate: the data has no classes: name a teacher"):
        evaluate(nn.Flatten(), [torch.randn(2, 3)])
    with pytest.raises(ValueError, match="evaluate: the networks have no floating point outputs to compare"):
        evaluate(nn.Identity(), [torch.ones(2).long()], teacher=nn.Identity())
    with pytest.raises(ValueError, match=r"evaluate: the output of the teacher holds NaN or infinity"):
        evaluate(nn.Identity(), [torch.zeros(2, 3)], teacher=Log())
    with pytest.raises(ValueError, match=r"evaluate: the output of the model holds NaN or infinity"):
        evaluate(Log(), [torch.zeros(2, 3)], teacher=nn.Identity())
    with pytest.raises(ValueError, match=r"the model's output is dict but the data has 2 classes"):
        evaluate(Heads(), [(((torch.randn(2, 11), torch.randn(2, 11))), torch.tensor([0, 1]))])
    assert LoaderSplit.of([torch.ones(2)]).count == 1


def test_a_model_in_evaluation_mode_stays_in_it_where_outputs_are_learnt() -> None:
    """The statistics of batches would be noise in what is to be learnt; in training mode they are what is asked for."""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Conv1d(1, 4, 3), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Conv1d(4, 2, 1))
    x = torch.randn(40, 1, 9)
    for _ in range(30):
        teacher(x)
    for training in (False, True):
        student = copy.deepcopy(teacher).train(training)
        mean = student[1].running_mean.clone()
        history = train(student, list(x.split(10)), RECIPE, teacher=teacher)
        assert torch.equal(student[1].running_mean, mean) == (not training)
        assert (history.error < 1e-3) == (not training)
