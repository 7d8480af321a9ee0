from __future__ import annotations

import torch
from torch import Tensor, nn

from sepconv.convert.outputs import tensors
from sepconv.convert.ranks.sensitivity import FLOOR, output_metrics
from sepconv.convert.sites import find_sites
from sepconv.leaves import Inputs


def test_output_metric_of_a_linear_network_is_its_jacobian() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(27, 4, bias=False)).double()
    model.requires_grad_(False)
    metrics = output_metrics(
        model, find_sites(model), [Inputs.of(torch.randn(64, 2, 5, 5, dtype=torch.float64))] * 8, draws=64
    )
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
    metrics = output_metrics(model, find_sites(model), [Inputs.of(x)])
    assert {name: tuple(g.shape) for name, g in metrics.items()} == {"first": (3, 3), "second": (3, 3)}
    assert all(torch.linalg.eigvalsh(g).min() > 0 for g in metrics.values())
    assert not any(p.requires_grad for p in model.parameters())


def test_output_metrics_count_each_output_by_its_scale() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.a, self.b = nn.Conv2d(2, 3, 3), nn.Conv2d(3, 2, 1), nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.conv(x)
            return self.a(y), self.b(y)

    model = Heads().double().requires_grad_(False)
    batch = Inputs.of(torch.randn(64, 2, 5, 5, dtype=torch.float64))
    found = {
        scales: output_metrics(model, find_sites(model), [batch] * 8, draws=16, scales=scales)["conv"]
        for scales in ((1.0, 0.0), (0.0, 1.0), (3.0, 5.0))
    }
    expected = 3 * found[1.0, 0.0] + 5 * found[0.0, 1.0]
    torch.testing.assert_close(found[3.0, 5.0], expected, rtol=0.05, atol=0.05 * float(expected.abs().max()))
