"""Images mixed in pairs, with the labels in the same shares."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from distributed_run import random_data
from torch import nn

from sepconv.train import Mix, Recipe, train

CLASSES = 7


def batch(count: int = 64, height: int = 12, width: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Images whose every pixel is the image's number, so that a mixed pixel tells where it is from."""
    images = torch.arange(float(count)).view(-1, 1, 1, 1).expand(count, 2, height, width)
    return images.contiguous(memory_format=torch.channels_last), torch.arange(count) % CLASSES


def partner(values: torch.Tensor) -> torch.Tensor:
    return values.roll(1, 0)


def test_cutmix_puts_a_rectangle_of_the_neighbour_into_each_image() -> None:
    torch.manual_seed(0)
    images, labels = batch()
    mixed, target = Mix(cutmix=1.0)(images, labels, CLASSES)
    of_other = mixed == partner(images)
    assert torch.equal(mixed, torch.where(of_other, partner(images), images))
    assert mixed.is_contiguous(memory_format=torch.channels_last)
    area = of_other[:, 0].float().mean((1, 2))
    rows, columns = of_other[:, 0].any(2).sum(1), of_other[:, 0].any(1).sum(1)
    assert torch.equal(rows * columns, of_other[:, 0].sum((1, 2)))
    assert area.min() < 0.1
    assert area.max() > 0.8
    assert 0.4 < area.mean() < 0.6
    one = nn.functional.one_hot(labels, CLASSES)
    torch.testing.assert_close(target, one * (1 - area)[:, None] + partner(one) * area[:, None])


def test_a_rectangle_has_the_images_form_and_any_place() -> None:
    torch.manual_seed(0)
    images, labels = batch(2000)
    inside = (Mix(cutmix=1.0)(images, labels, CLASSES)[0] == partner(images))[:, 0]
    rows, columns = inside.any(2).sum(1), inside.any(1).sum(1)
    assert ((rows * 16 - columns * 12).abs() <= 16).all()
    covered = inside.float().mean(0)
    assert covered.min() > 0.1
    torch.testing.assert_close(covered, covered.flip(0), atol=0.06, rtol=0)
    torch.testing.assert_close(covered, covered.flip(1), atol=0.06, rtol=0)


def test_mixup_is_the_mean_of_two_images_in_the_labels_shares() -> None:
    torch.manual_seed(0)
    images, labels = batch()
    mixed, target = Mix(mixup=1.0)(images, labels, CLASSES)
    one = nn.functional.one_hot(labels, CLASSES)
    share = (mixed - images)[:, 0, 0, 0] / (partner(images) - images)[:, 0, 0, 0]
    assert (share.max() - share.min()) > 0.8
    torch.testing.assert_close(mixed, images.lerp(partner(images), share.view(-1, 1, 1, 1).expand_as(images)))
    torch.testing.assert_close(target, one * (1 - share)[:, None] + partner(one) * share[:, None])


def test_with_both_a_coin_decides_for_each_image() -> None:
    torch.manual_seed(0)
    images, labels = batch(500)
    mixed, target = Mix(mixup=1.0, cutmix=1.0)(images, labels, CLASSES)
    flat = mixed.flatten(1)
    whole = ((flat == images.flatten(1)) | (flat == partner(images).flatten(1))).all(1)
    assert 0.4 < whole.float().mean() < 0.6
    torch.testing.assert_close(target.sum(1), torch.ones(500))


def test_a_small_alpha_leaves_most_images_nearly_whole() -> None:
    torch.manual_seed(0)
    images, labels = batch(1000)
    strong, weak = (Mix(mixup=alpha)(images, labels, CLASSES)[1].amax(1).mean() for alpha in (1.0, 0.1))
    assert strong < 0.8 < 0.93 < weak


def test_one_image_is_left_as_it_is() -> None:
    images, labels = batch(1)
    mixed, target = Mix(mixup=1.0, cutmix=1.0)(images, labels, CLASSES)
    assert torch.equal(mixed, images)
    assert target.argmax(1).equal(labels)


def test_nothing_wanted_is_nothing_done() -> None:
    assert not Mix()
    assert Mix(mixup=0.2)
    assert Mix(cutmix=1.0)


@pytest.mark.parametrize("settings", [{}, {"mixup": 0.4}, {"cutmix": 1.0}])
def test_the_loss_is_that_of_the_mixed_images(settings: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """One step of plain gradient descent from known weights, computed here by hand."""
    data = random_data()
    recipe = Recipe(epochs=1, batch_size=len(data.train), lr=0.1, momentum=0.0, weight_decay=0.0, schedule="constant")
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    mix = Mix.__call__
    monkeypatch.setattr(Mix, "__call__", lambda self, *given: seen.append(mix(self, *given)) or seen[-1])
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(torch.Size(data.input_shape).numel(), data.num_classes))
    before = [p.detach().clone() for p in model.parameters()]
    train(model, data, replace(recipe, **settings))
    assert len(seen) == (1 if settings else 0)
    if settings:
        other = nn.Sequential(nn.Flatten(), nn.Linear(before[0].shape[1], before[0].shape[0]))
        other[1].load_state_dict({"weight": before[0], "bias": before[1]})
        images, target = seen[0]
        (-(other(images).log_softmax(1) * target).sum(1).mean()).backward()
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p, q - 0.1 * q.grad)
