"""What images ask of one layer: the least-squares problem that every form is fitted to.

With xx = E[p p^T] over patches p of C*k values, yx = E[y p^T] for target outputs y, and a metric G on output
channels, the error of a layer A (O x C*k) is

    E[(y - A p)^T G (y - A p)] = const - 2 <G yx, A> + <G A xx, A>.

Everything is in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class LeastSquares:
    """One layer's least-squares problem, centred (the bias follows from the means) and regularised.

    Shape:
        xx: (C*k, C*k)    yx: (O, C*k)    yy: (O, O)    metric: (O, O)
    """

    xx: Tensor
    yx: Tensor
    yy: Tensor
    metric: Tensor
    channels: int

    @property
    def taps(self) -> int:
        return self.xx.shape[0] // self.channels

    def block(self, channel: int) -> slice:
        return slice(channel * self.taps, (channel + 1) * self.taps)

    def own_blocks(self) -> Tensor:
        """The (k, k) patch covariance of every channel: (C, k, k)."""
        blocks = self.xx.view(self.channels, self.taps, self.channels, self.taps)
        return blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)

    def error(self, weight: Tensor) -> float:
        """The metric's squared error of a layer of shape (O, C, k)."""
        flat = weight.flatten(1)
        cross = self.yx @ flat.T
        total = self.yy - cross - cross.T + flat @ self.xx @ flat.T
        return max(0.0, float((self.metric * total).sum()))

    def total(self) -> float:
        """The error of a layer that answers zero everywhere, which relative errors are relative to."""
        return float((self.metric * self.yy).sum())

    def relative_error(self, weight: Tensor) -> float:
        return self.error(weight) / max(self.total(), 1e-300)
