from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sepconv.convert.batch_norm import reestimate
from sepconv.convert.graph import find_sites
from sepconv.convert.passes import Images, calls
from sepconv.convert.probe import Probe
from sepconv.convert.sensitivity import FLOOR, output_metrics, tensors

CPU = torch.device("cpu")


def test_images_are_cut_into_batches_that_fit() -> None:
    images = Images(torch.randn(20, 3, 600, 600), CPU, torch.float32)
    assert [len(batch) for batch in images.batches()] == [8, 8, 4]
    assert [len(batch) for batch in images.batches(10)] == [8, 2]
    small = Images(iter([torch.randn(200, 1, 4, 4), (torch.randn(100, 1, 4, 4), None)]), CPU, torch.float64)
    assert [len(batch) for batch in small.batches()] == [128, 128, 44]
    assert next(small.batches()).dtype == torch.float64
    assert small.count == 300


def test_images_of_several_sizes_stay_apart() -> None:
    images = Images([torch.randn(3, 1, 4, 4), torch.randn(5, 1, 6, 6)], CPU, torch.float32)
    assert [tuple(batch.shape) for batch in images.batches()] == [(3, 1, 4, 4), (5, 1, 6, 6)]
    assert [len(batch) for batch in images.batches(4)] == [3, 1]


def test_calls_stop_after_the_last_and_see_values_before_they_change() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 1)
            self.later = 0

        def forward(self, x: Tensor) -> Tensor:
            try:
                x = self.conv(x)
                x.zero_()
                x = self.conv(x)
            except Exception:
                return x
            self.later += 1
            return x

    model, x = Twice(), torch.randn(2, 2, 3, 3)
    seen = calls(model, model.conv, x, 2)
    assert model.later == 0
    assert not model.conv._forward_hooks
    torch.testing.assert_close(seen[0][1], nn.functional.conv2d(x, model.conv.weight, model.conv.bias).detach())
    assert torch.equal(seen[1][0], torch.zeros_like(x))


def test_output_metric_of_a_linear_network_is_its_jacobian() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(27, 4, bias=False)).double()
    model.requires_grad_(False)
    metrics = output_metrics(model, find_sites(model), [torch.randn(64, 2, 5, 5, dtype=torch.float64)] * 8, draws=64)
    jacobian = model[2].weight.view(4, 3, 9)
    exact = torch.einsum("acp,adp->cd", jacobian, jacobian)
    exact += FLOOR * exact.diagonal().mean() * torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(metrics["0"], exact, rtol=0.02, atol=0.02 * float(exact.diagonal().mean()))


def test_output_metrics_pass_in_place_activations_and_odd_outputs() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(2, 3, 3), nn.Conv2d(3, 3, 3)

        def forward(self, x: Tensor) -> dict[str, object]:
            y = self.second(torch.relu_(self.first(x)))
            return {"maps": [y, (y.argmax(1), y.mean())], "name": "y"}

    model = Model().requires_grad_(False)
    x = torch.randn(5, 2, 7, 7)
    assert [tuple(t.shape) for t in tensors(model(x))] == [(5, 3, 3, 3), ()]
    metrics = output_metrics(model, find_sites(model), [x])
    assert {name: tuple(g.shape) for name, g in metrics.items()} == {"first": (3, 3), "second": (3, 3)}
    assert all(torch.linalg.eigvalsh(g).min() > 0 for g in metrics.values())
    assert not any(p.requires_grad for p in model.parameters())


def networks() -> tuple[nn.Module, nn.Module, Images]:
    def make() -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5))

    old, new = make().double(), make().double()
    images = Images(torch.randn(300, 3, 9, 9) * 2 + 1, CPU, torch.float64)
    for x in images.batches():
        old(x[:64])
    new.load_state_dict(old.state_dict())
    return old.eval(), new.eval(), images


def test_reestimate_changes_nothing_where_nothing_differs() -> None:
    old, new, images = networks()
    assert reestimate(old, new, images) == 2
    for (key, a), b in zip(old.state_dict().items(), new.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=key)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in [*old.modules(), *new.modules()])


def test_reestimate_undoes_shifts_and_scales_of_channels() -> None:
    old, new, images = networks()
    with torch.no_grad():
        new[0].weight *= torch.tensor([0.5, 2, 1, 3])[:, None, None, None]
        new[0].bias.mul_(torch.tensor([0.5, 2, 1, 3])).add_(torch.tensor([1, 0, -2, 5]))
        new[3].weight *= 0.25
    x = next(images.batches())
    assert (old(x) - new(x)).abs().max() > 0.5
    reestimate(old, new, images)
    torch.testing.assert_close(new(x), old(x), rtol=1e-3, atol=1e-3)


def test_reestimate_leaves_norms_without_statistics() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))
    assert reestimate(model, model, Images(torch.randn(9, 3, 5, 5), CPU, torch.float32)) == 0


def test_a_probe_is_the_network_with_that_layer_changed() -> None:
    old, new, images = networks()
    old.requires_grad_(False)
    probe = Probe(old, images)
    assert probe.sees_outputs
    (first, _) = find_sites(old)
    before = first.conv.weight.clone()
    weight, shift = torch.randn(4, 3, 9, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    with torch.no_grad():
        new[0].weight.copy_(weight.view(4, 3, 3, 3))
        new[0].bias += shift
        expected = sum(float((old(x) - new(x)).square().sum()) for x in images.batches(256))
    assert probe.error(first, weight, shift) == pytest.approx(expected)
    assert torch.equal(first.conv.weight, before)
    assert probe.error(first, before.flatten(2), torch.zeros(4)) == 0
    assert not first.conv._forward_hooks
