"""What moves numbers, and what is along some dimensions, runs in a C library with nothing undefined in it."""

from __future__ import annotations

from pathlib import Path

import device_run
import pytest
import torch
from device_run import native, needs
from torch import Tensor, nn
from torch.nn import functional as F

import sepconv
from sepconv.device import targets

SANITIZED = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g")


class Everything(nn.Module):
    """A network with one of each, after a convolution that makes it worth while."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 12, 3, padding=1)
        self.up = nn.ConvTranspose2d(12, 8, 4, 2, 1)
        self.last = nn.Linear(8 * 7 * 5 + 8, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(F.pad(x, (1, 1, 1, 1), mode="reflect"))
        weights = torch.stack([x[:, :6], x[:, 6:]], 1).softmax(1)
        x = torch.cat([(weights * x.unflatten(1, (2, 6))).sum(1), x.roll(1, 2).flip(3)[:, 3:9]], 1)
        x = self.up(x) + F.pixel_shuffle(x.repeat(1, 3, 1, 1)[:, :32], 2)
        x = torch.cat([x, x.amax(2, keepdim=True)], 2)
        small = F.adaptive_avg_pool2d(x, (7, 5)) + F.adaptive_max_pool2d(x, (7, 5))
        return self.last(torch.cat([small.flatten(1), x.mean((2, 3)).abs().pow(0.4)], 1)).log_softmax(1)


EXAMPLE = torch.randn(1, 3, 11, 13, generator=torch.Generator().manual_seed(3))


def answer(x: Tensor) -> Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        found: Tensor = Everything().eval()(x)
    return found


def exported(target: str, folder: Path) -> sepconv.device.ExportedLibrary:
    torch.manual_seed(0)
    return sepconv.export_c(Everything().eval(), EXAMPLE, folder, target=target)


def test_everything_under_sanitizers(tmp_path: Path) -> None:
    target = targets.TARGETS[native()]
    library, program = exported(target.name, tmp_path / "lib"), tmp_path / "example"
    device_run.check.build(library, target, program, *SANITIZED)
    for x in (EXAMPLE, torch.randn_like(EXAMPLE)):
        [got] = device_run.check.answers(library, target, program, [x])
        torch.testing.assert_close(got, answer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["x86-64-linux", "arm-64-linux", "wasm-32"])
def test_everything_on_other_machines(target: str, tmp_path: Path) -> None:
    needs(target)
    library, program = exported(target, tmp_path / "lib"), tmp_path / "example"
    device_run.check.build(library, targets.TARGETS[target], program)
    [got] = device_run.check.answers(library, targets.TARGETS[target], program, [EXAMPLE])
    torch.testing.assert_close(got, answer(EXAMPLE), rtol=1e-4, atol=1e-5)


def test_kernels_do_not_give_way_to_a_pytorch_that_is_not_there(tmp_path: Path) -> None:
    """A shuffle of many parts is PyTorch's here, and ours on a device."""

    class Shuffled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.shuffle = nn.Conv2d(3, 12, 1), nn.ChannelShuffle(6)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.shuffle(self.first(x))
            return found

    torch.manual_seed(0)
    model, x = Shuffled().eval(), torch.randn(1, 3, 5, 7)
    groups = sepconv.compile(model, x).explain().groups
    assert [group.kernel for group in groups] == ["halide", "torch"]
    assert "in registers" in groups[1].reason
    assert sepconv.export_c(model, x, tmp_path, target=native(), check=True).checked.startswith("the example gives")
