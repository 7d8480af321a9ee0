"""A network on volumes, in three dimensions, that says for every voxel what it is of.

python examples/volumes.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import sepconv
from sepconv.train import evaluate


class VoxelNet(nn.Module):
    """(N, 1, D, H, W) -> (N, 3, D, H, W)."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv3d(1, width, 3, padding=1, bias=False),
            nn.BatchNorm3d(width),
            nn.ReLU(),
            nn.Conv3d(width, width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv3d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Upsample(scale_factor=2),
            nn.Conv3d(width, 3, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def scans(count: int, seed: int) -> Tensor:
    noise = torch.randn(count, 1, 4, 4, 4, generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(noise, size=8, mode="trilinear")


@torch.no_grad()
def same_voxels(model: nn.Module, other: nn.Module, x: Tensor) -> float:
    """Share of voxels that both networks take for the same."""
    return float((model(x).argmax(1) == other(x).argmax(1)).float().mean())


def trained(steps: int = 40) -> nn.Module:
    """To tell dark, middle and bright voxels apart behind some noise."""
    model = VoxelNet()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for step in range(steps):
        x = scans(8, seed=step)
        loss = nn.functional.cross_entropy(model(x + 0.1 * torch.randn_like(x)), (2 * x + 1.5).clamp(0, 2).long()[:, 0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def main() -> dict[str, float]:
    torch.manual_seed(0)
    model = trained()

    separable, plan = sepconv.convert(model, scans(48, seed=1000), budget=1 / 3)
    print(plan)
    found = evaluate(separable, [scans(16, seed=2000)], teacher=model)
    same = same_voxels(model, separable, scans(16, seed=2000))
    print(f"{found}\nthe same for {same:.1%} of the voxels")
    return {"converted": found.relative_error, "same": same}


if __name__ == "__main__":
    main()
