"""A layer's stages: what its modules are now, in their order."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import sepconv
from sepconv.layers.stage import Stage, in_sequence, nested


def _layer() -> Any:
    return sepconv.SeparableConv2d(4, 6, 3, norm="batch", activation="relu6", pointwise_layers=2)


def test_stages_are_the_modules_in_order() -> None:
    layer = _layer()
    assert layer.stages == [
        Stage(layer.depthwise, layer.depthwise_norm, layer.activation),
        Stage(layer.pointwise, layer.pointwise_norm, layer.activation),
        Stage(layer.pointwise2, layer.pointwise2_norm, layer.activation),
    ]
    bare: Any = sepconv.SeparableConv1d(4, 6, 3)
    assert bare.stages == [Stage(bare.depthwise), Stage(bare.pointwise)]


@pytest.mark.parametrize("name", ["depthwise", "pointwise_norm", "pointwise2_norm", "activation"])
def test_stages_hold_what_was_put_in_last(name: str) -> None:
    layer, x = _layer().eval(), torch.randn(2, 4, 7, 7)
    y = layer(x)
    other = nn.Conv2d(4, 4, 3) if name == "depthwise" else nn.SELU()
    setattr(layer, name, other)
    assert any(other is part for stage in layer.stages for part in stage)
    changed = layer(x)
    assert not torch.allclose(changed, y)
    for stage in layer.stages:
        x = stage(x)
    torch.testing.assert_close(changed, x)


def test_a_copy_has_stages_of_its_own() -> None:
    layer = _layer()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        parts = [part for stage in other.stages for part in stage]
        assert not {id(part) for part in parts} & {id(module) for module in layer.modules()}
        assert {id(part) for part in parts} == {id(module) for module in other.children()}


def test_stages_of_modules_in_sequence() -> None:
    conv, norm, act = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()
    assert in_sequence(nn.Sequential(nn.Sequential(conv, norm, act), nn.Sequential(conv, act), conv)) == [
        Stage(conv, norm, act),
        Stage(conv, None, act),
        Stage(conv),
    ]
    for others in ((), (act,), (norm,), (conv, act, norm), (conv, norm, norm), (conv, act, act), (conv, nn.SELU())):
        assert in_sequence(nn.Sequential(*others)) is None
    inner = nn.Sequential(conv)
    outer = nn.Sequential(nn.Sequential(inner), act)
    assert nested(outer) == [outer, outer[0], inner]
