"""A network on waveforms, in one dimension: strided and dilated convolutions, two signals in and two out.

python examples/audio.py
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import sepconv
from sepconv.train import Recipe, evaluate, train


@dataclass
class Voices:
    wave: Tensor
    loudness: Tensor


class Denoiser(nn.Module):
    """What is left of a waveform after a recording of the noise was seen: (N, 1, T) each."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.encode = nn.Conv1d(2, width, 9, stride=2, padding=4)
        self.body = nn.Sequential(
            nn.GELU(),
            nn.Conv1d(width, width, 5, padding=4, dilation=2),
            nn.GroupNorm(2, width),
            nn.GELU(),
            nn.Conv1d(width, width, 5, padding=8, dilation=4),
            nn.GELU(),
        )
        self.decode = nn.ConvTranspose1d(width, 1, 8, stride=2, padding=3)

    def forward(self, mixture: Tensor, noise: Tensor) -> Voices:
        wave = self.decode(self.body(self.encode(torch.cat([mixture, noise], 1))))
        return Voices(wave, wave.square().mean((1, 2)))


class Recordings(Dataset[dict[str, Tensor]]):
    """Samples as dicts of the network's arguments; what is called "target" is not given to it."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(1000 * self.seed + index)
        tone = torch.sin(torch.arange(64.0) * (0.1 + torch.rand(1, generator=random)))[None]
        noise = torch.randn(1, 64, generator=random)
        return {"mixture": tone + 0.3 * noise, "noise": noise, "target": tone}


def trained(loader: DataLoader[dict[str, Tensor]], epochs: int = 12) -> nn.Module:
    model = Denoiser()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(epochs):
        for batch in loader:
            found = model(batch["mixture"], batch["noise"]).wave
            loss = (found - batch["target"]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def main() -> dict[str, float]:
    torch.manual_seed(0)
    loader = DataLoader(Recordings(64, seed=1), batch_size=16, shuffle=True)
    tests = DataLoader(Recordings(32, seed=2), batch_size=16)
    model = trained(loader)

    separable, plan = sepconv.convert(model, loader, budget=1 / 2, metric="macs")
    print(plan)
    converted = evaluate(separable, tests, teacher=model)
    train(separable, loader, Recipe(epochs=3, lr=0.001, optimizer="adamw"), teacher=model, val=tests)
    distilled = evaluate(separable, tests, teacher=model)
    print(f"converted: {converted}\ndistilled: {distilled}")
    return {"converted": converted.relative_error, "distilled": distilled.relative_error}


if __name__ == "__main__":
    main()
