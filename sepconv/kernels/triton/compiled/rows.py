"""Which rows of an image a tile reads, and under which taps they count: known when a program is compiled."""

from __future__ import annotations

import triton


@triton.constexpr_function
def reads(deep, step, rows, advance):
    """The rows that so many rows of taps read for so many rows of a tile."""
    return tuple(sorted({r * step + j * advance for r in range(deep) for j in range(rows)}))


@triton.constexpr_function
def met(row, read, step, rows, advance):
    """The row of taps under which row ``read`` of an image counts for row ``row`` of a tile; -1 where there is none."""
    tap, rest = divmod(read - row * step, advance)
    return tap if rest == 0 and 0 <= tap < rows else -1
