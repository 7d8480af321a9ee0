"""Learning from a teacher: the loss as documented, features, what is refused, and that it works."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from distributed_run import RECIPE, network
from torch import Tensor, nn
from torch.nn import functional as F

from sepconv.data import Data
from sepconv.leaves import Inputs
from sepconv.train import Distillation, Recipe, train
from sepconv.train.distill import Guide, matching_features, softened_divergence


def hand_made_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    p, q = ((x.double() / temperature).softmax(1) for x in (teacher, student))
    return temperature**2 * (p * (p.log() - q.log())).sum(1).mean()


def test_softened_divergence_is_hintons() -> None:
    student, teacher = torch.randn(2, 7, 5)
    found = softened_divergence(student, teacher, 3.0)
    torch.testing.assert_close(found.double(), hand_made_loss(student, teacher, 3.0), rtol=1e-5, atol=1e-6)
    assert softened_divergence(teacher, teacher, 3.0).abs() < 1e-5


def test_guide_adds_the_parts_as_documented(data: Data) -> None:
    student, teacher = network(), network(norm=True)
    with torch.no_grad():
        teacher[0].weight.add_(0.3)
    images, labels = next(data.train.batches(16))
    settings = Distillation(2.0, 0.7, [("0", "0"), ("2", "2")], feature_weight=0.4)
    inputs = Inputs.of(images)
    with Guide(student, teacher, settings, inputs, classes=True) as guide:
        logits = student(images)
        label_loss = F.cross_entropy(logits, labels)
        found = guide.loss(logits, inputs, label_loss)
    teacher.eval()
    expected = 0.7 * hand_made_loss(logits, teacher(images), 2.0) + 0.3 * label_loss
    for layer in (1, 3):
        mine, theirs = student[:layer](images), teacher[:layer](images)
        expected = expected + 0.2 * (mine - theirs).square().mean() / theirs.var()
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-5, atol=1e-6)


def test_alpha_one_uses_no_labels(data: Data) -> None:
    shuffled = replace(data, train=replace(data.train, labels=data.train.labels.roll(1)))
    losses = [
        train(network(), d, RECIPE, teacher=network(), distillation=Distillation(alpha=1.0)).records[-1]["train_loss"]
        for d in (data, shuffled)
    ]
    assert losses[0] == losses[1]


def test_teacher_is_not_touched_and_hooks_are_removed(data: Data) -> None:
    student, teacher = network(norm=True), network(norm=True, dropout=0.5).train()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    train(student, data, RECIPE, teacher=teacher, distillation=Distillation(features="auto"))
    assert teacher.training
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())
    assert not any(m._forward_hooks for model in (student, teacher) for m in model.modules())


def test_matching_features_are_the_last_of_each_size() -> None:
    def net(width: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, width, 1), nn.Conv2d(width, 3, 1), nn.Flatten()
        )

    example = Inputs.of(torch.randn(2, 1, 6, 6))
    assert matching_features(net(5), net(7), example) == (("1", "1"), ("4", "4"))
    with pytest.raises(ValueError, match="no module has the same name and output shape"):
        matching_features(nn.Sequential(nn.Conv2d(1, 2, 1)), nn.Sequential(nn.Conv2d(1, 3, 1)), example)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "temperature must be above 0 but is 0.0"),
        ({"alpha": 1.1}, "alpha must be from 0 to 1 but is 1.1"),
        ({"feature_weight": -1.0}, "feature_weight must be at least 0 but is -1.0"),
        ({"features": "all"}, "features must be pairs or .auto. but is 'all'"),
    ],
)
def test_distillation_refuses(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"Distillation: {message}"):
        Distillation(**settings)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (("9", "0"), "the student has no module called '9'"),
        (("0", "layer"), "the teacher has no module called 'layer'"),
        (("0", "3"), r"features of 0 have shape \(61, 8, 6, 6\) in the student, those of 3 \(61, 8, 4, 4\)"),
    ],
)
def test_features_that_do_not_fit(data: Data, pair: tuple[str, str], message: str) -> None:
    student = network()
    with pytest.raises(ValueError, match=message):
        train(student, data, RECIPE, teacher=network(), distillation=Distillation(features=[pair]))
    assert not any(m._forward_hooks for m in student.modules())


def test_distilled_student_learns_from_the_teacher_alone(data: Data) -> None:
    """Nine of ten labels are wrong, the teacher is right."""
    recipe = Recipe(epochs=15, batch_size=15, lr=0.1)
    teacher = network(norm=True)
    assert train(teacher, data, recipe).accuracy > 0.9
    wrong = replace(data, train=replace(data.train, labels=(data.train.labels + 1) % 5))
    student = network(norm=True)
    history = train(student, wrong, recipe, teacher=teacher, distillation=Distillation(alpha=1.0))
    assert history.accuracy > 0.9


def frozen_network(how: str) -> nn.Module:
    """One whose first batch norm the caller froze."""
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 5, 3), nn.BatchNorm2d(5), nn.AdaptiveAvgPool2d(1)
    )
    model.append(nn.Flatten())
    if how == "eval":
        model[1].eval()
    elif how == "gradient":
        model[1].requires_grad_(False)
    else:
        model[1].momentum = 0.0
    return model


@pytest.mark.parametrize("how", ["eval", "gradient", "momentum", "gradient of a model in evaluation mode"])
def test_a_frozen_norm_stays_frozen(data: Data, how: str) -> None:
    student = frozen_network(how.split(" ")[0])
    if "evaluation" in how:
        student.eval()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    seen = []
    student[1].register_forward_hook(lambda norm, *_: seen.append(norm.training))
    train(student, data, RECIPE, teacher=network())
    assert not any(seen)
    for key in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(before[f"1.{key}"], student.state_dict()[f"1.{key}"])
        assert not torch.equal(before[f"4.{key}"], student.state_dict()[f"4.{key}"])


def test_a_model_in_evaluation_mode_is_trained_as_a_whole(data: Data) -> None:
    """One from a file with a new last layer, say, which is in training mode as all new modules are."""
    student = frozen_network("nothing").eval()
    student[1].momentum = 0.1
    student.append(nn.Linear(5, 5))
    before = student[1].running_mean.clone()
    train(student, data, RECIPE)
    assert not torch.equal(student[1].running_mean, before)
    assert not any(module.training for module in student.modules())


def test_the_teacher_stays_where_and_how_it_is(data: Data) -> None:
    """Its frozen norm, the layout of its weights and its hooks; the student is another object and its images too."""
    teacher = frozen_network("eval")
    teacher[1].register_forward_hook(lambda *_: None)
    strides = [p.stride() for p in teacher.parameters()]
    ids = [id(p) for p in teacher.parameters()]
    train(network(), data, RECIPE, teacher=teacher)
    assert [module.training for module in teacher] == [True, False, True, True, True, True, True]
    assert ([p.stride() for p in teacher.parameters()], [id(p) for p in teacher.parameters()]) == (strides, ids)
    assert len(teacher[1]._forward_hooks) == 1


def test_networks_that_change_their_input_do_not_disturb_each_other(data: Data) -> None:
    losses = []
    for inplace in (False, True):
        student, teacher = (nn.Sequential(nn.ReLU(inplace), network(norm=norm)) for norm in (False, True))
        settings = Distillation(features=[("1.0", "1.0")])
        losses.append(train(student, data, RECIPE, teacher=teacher, distillation=settings).records[-1]["train_loss"])
    assert losses[0] == losses[1]
