"""A captured graph rewritten in place: constants folded, groups recognised, their surroundings absorbed,
what is left fused."""

from __future__ import annotations

from torch import fx

from sepconv.compile.passes.absorb import absorb, pair
from sepconv.compile.passes.axes import recognise_axes
from sepconv.compile.passes.constants import fold_constants
from sepconv.compile.passes.elementwise import fuse_elementwise
from sepconv.compile.passes.precision import store_in_bfloat16
from sepconv.compile.passes.quantize import keep_quantized
from sepconv.compile.passes.recognise import recognise
from sepconv.compile.passes.signals import signals_to_images
from sepconv.compile.passes.strides import keep_strides
from sepconv.compile.passes.trim import trim
from sepconv.compile.precision import BFLOAT16, FLOAT32
from sepconv.compile.store import Store


def rewrite(graph: fx.Graph, store: Store, precision: str = FLOAT32) -> None:
    """Rewrite a captured graph into groups and what is left for PyTorch, in place."""
    graph.eliminate_dead_code()
    keep_strides(graph)
    fold_constants(graph, store)
    recognise(graph, store)
    trim(graph, store)
    absorb(graph, store)
    recognise_axes(graph)
    graph.eliminate_dead_code()
    fuse_elementwise(graph, store)
    keep_quantized(graph)
    signals_to_images(graph, store)
    pair(graph)
    graph.eliminate_dead_code()
    if precision == BFLOAT16:
        store_in_bfloat16(graph)
