"""Files are outside data: what one says of its network is refused in one line unless it is plain, small and true."""

from __future__ import annotations

import json
import os
import sys
import types
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_run import sepconv
from safetensors.torch import save_file
from torch import nn

from sepconv import models
from sepconv.layers import SeparableConv2d
from sepconv.runs import png, structure
from sepconv.runs.card import Card, from_text
from sepconv.runs.model_file import FILE, open_model, read_card, write

SETTINGS = {"in_channels": 1, "width_mult": 0.25}
GOOD = Card("vgg_small", SETTINGS, [], (1, 8, 8), [str(i) for i in range(10)], [0.3], [0.4], "digits")
CONV = {"kind": "Conv2d", "arguments": {"in_channels": 1, "out_channels": 8, "kernel_size": 3}, "children": {}}


def _file(path: Path, description: Any, model: nn.Module | None = None) -> Path:
    """A file with the weights of the good card, or of `model`, and this description."""
    model = GOOD.build() if model is None else model
    text = description if isinstance(description, str) else json.dumps(description)
    path.parent.mkdir(exist_ok=True)
    save_file(model.state_dict(), path, metadata={"sepconv": text})
    return path


def _with(**entries: Any) -> dict[str, Any]:
    return {**asdict(GOOD), **entries}


def _changed(change: Any) -> dict[str, Any]:
    return _with(changes=[change])


def _conv(**arguments: Any) -> dict[str, Any]:
    """The first layer as it is, but for these arguments."""
    usual = {**CONV["arguments"], "padding": 1, "bias": False}  # type: ignore[dict-item]
    return _changed({"path": "stages.0.0.0", **CONV, "arguments": {**usual, **arguments}})


class TestCodeFromFiles:
    """A file that names a function of somebody else's; every command and every function that opens files."""

    @pytest.fixture
    def marker(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """Is there after the function that the file names was called."""
        marker = tmp_path / "marker"
        module = types.ModuleType("somebody")
        module.net = lambda command: Path(command).touch() or GOOD.build()  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "somebody", module)
        return marker

    @pytest.fixture
    def run(self, marker: Path, tmp_path: Path) -> Path:
        _file(tmp_path / "run" / FILE, _with(model="somebody:net", settings={"command": str(marker)}))
        return tmp_path / "run"

    @pytest.mark.parametrize("as_file", [False, True], ids=["folder", "file"])
    @pytest.mark.parametrize("command", ["count", "predict", "export", "convert", "train", "bench tune"])
    def test_file_alone_runs_nothing(
        self, run: Path, marker: Path, tmp_path: Path, command: str, as_file: bool
    ) -> None:
        extra = {
            "export": ("--onnx", tmp_path / "a.onnx"),
            "predict": (tmp_path / "a.png",),
            "convert": ("--data", "digits", "--out", tmp_path / "out"),
            "train": ("--data", "digits", "--out", tmp_path / "out"),
        }
        ran = sepconv(*command.split(), run / FILE if as_file else run, *extra.get(command, ()))
        ran.failed_with(2, "'somebody:net'", "runs code", f"somebody:net --weights {run / FILE}")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]

    @pytest.mark.parametrize("model", ["os:system", "builtins:exec", "timm/resnet18", "nonsense", "sepconv:count"])
    def test_only_built_in_names_count(self, tmp_path: Path, model: str) -> None:
        path = _file(tmp_path / FILE, _with(model=model, settings={"command": f"touch {tmp_path}/marker"}))
        assert read_card(path) is not None
        with pytest.raises(ValueError, match="runs code from outside"):
            open_model(str(tmp_path))
        assert not (tmp_path / "marker").exists()

    def test_name_that_the_user_gives_too_is_called(self, run: Path, marker: Path) -> None:
        ran = sepconv("count", "somebody:net", "--weights", run / FILE, "--json", "-")
        assert ran.code == 0, ran.err
        assert marker.exists()

    def test_another_name_of_the_user_is_not_the_files(self, run: Path, marker: Path) -> None:
        settings = ("--set", "width_mult=0.25", "--set", "in_channels=1", "--input", "1x8x8")
        ran = sepconv("count", "vgg_small", *settings, "--weights", run / FILE)
        assert ran.code == 0, ran.err
        assert not marker.exists()

    def test_trust(self, run: Path, marker: Path) -> None:
        model, card = open_model(str(run), trust=True)
        assert card.model == "somebody:net"
        assert marker.exists()
        assert not model.training

    def test_changed_layers_of_a_trusted_model_hold_no_more_than_the_file(self, run: Path, marker: Path) -> None:
        huge = {"path": "stages.0.0.0", **CONV, "arguments": {**CONV["arguments"], "out_channels": 2**30}}  # type: ignore[dict-item]
        _file(run / FILE, _with(model="somebody:net", settings={"command": str(marker)}, changes=[huge]))
        with pytest.raises(ValueError, match="its changed layers have more weights than the file"):
            open_model("somebody:net", run / FILE)

    def test_timm_loads_nothing_else_for_a_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        given: list[dict[str, Any]] = []

        def create_model(name: str, **settings: Any) -> nn.Module:
            given.append(settings)
            return GOOD.build()

        timm = types.SimpleNamespace(list_models=lambda: ["net"], create_model=create_model)
        monkeypatch.setitem(sys.modules, "timm", timm)
        path = _file(tmp_path / FILE, _with(model="timm/net", settings={"pretrained": True, "in_chans": 1}))
        open_model("timm/net", path)
        assert given == [{"in_chans": 1}]
        for setting in ("checkpoint_path", "cache_dir", "pretrained_cfg"):
            _file(path, _with(model="timm/net", settings={setting: "evil"}))
            with pytest.raises(ValueError, match=f"setting '{setting}' is refused"):
                open_model("timm/net", path)


DAMAGED: list[Any] = [
    "",
    "{",
    "null",
    "[]",
    "3",
    "[" * 100_000,
    '{"model": "vgg_small", "mean": [NaN]}',
    '{"model": "vgg_small", "settings": {"width_mult": Infinity}}',
    '{"model": "vgg_small", "settings": {"width_mult": 1e999}}',
    {},
    _with(model=None),
    _with(model=""),
    _with(model=3),
    _with(model=["vgg_small"]),
    _with(model="x" * 10_000),
    _with(nonsense=1),
    _with(settings=None),
    _with(settings=[1]),
    _with(settings={"not a name": 1}),
    _with(settings={"width_mult": {"a": 1}}),
    _with(settings={"width_mult": [[1]]}),
    _with(settings={"width_mult": [1] * 1000}),
    _with(settings={"width_mult": "x" * 10_000}),
    _with(settings={f"a{i}": 1 for i in range(1000)}),
    _with(changes=None),
    _with(changes={"path": "stages.0.0.0"}),
    _with(input_shape=None),
    _with(input_shape=8),
    _with(input_shape=["1", 8, 8]),
    _with(input_shape=[1, 8.5, 8]),
    _with(input_shape=[1, -8, 8]),
    _with(input_shape=[1, True, 8]),
    _with(input_shape=[1, 10**6, 10**6]),
    _with(input_shape=[1] * 100),
    _with(classes=None),
    _with(classes="ten"),
    _with(classes=[1, 2]),
    _with(classes=["x" * 10_000]),
    _with(mean=None),
    _with(mean=0.5),
    _with(mean=["0.5"]),
    _with(mean=[0.1, 0.2]),
    _with(mean=[]),
    _with(std=[]),
    _with(std=[0]),
    _with(std=[-1]),
    _with(std=[[1]]),
    _with(input_shape=[]),
    _with(data=None),
    _with(data=["digits"]),
]


@pytest.mark.parametrize("description", DAMAGED, ids=lambda one: str(one)[-60:].replace("/", ""))
def test_damaged_description_is_one_line(tmp_path: Path, description: Any) -> None:
    path = _file(tmp_path / FILE, description)
    sepconv("count", tmp_path, "--input", "1x8x8").failed_with(2, f"the description in {path} is damaged")


SEPARABLE = structure.describe(SeparableConv2d(1, 8, 3, padding=1, bias=False, norm="batch"))
assert SEPARABLE is not None


def _separable(**children: Any) -> dict[str, Any]:
    return _changed({"path": "stages.0.0.0", **SEPARABLE, "children": {**SEPARABLE["children"], **children}})


UNTRUE: list[tuple[Any, str]] = [
    (_with(settings={"widht": 1}), "no setting 'widht'"),
    (_with(settings={**SETTINGS, "width_mult": 1e9}), "cannot be built"),
    (_with(settings={**SETTINGS, "width_mult": 1e308}), "cannot be built"),
    (_with(settings={**SETTINGS, "num_classes": 10**12}), "does not fit VGGSmall"),
    (_with(settings={**SETTINGS, "num_classes": 10**30}), "cannot be built"),
    (_with(settings={**SETTINGS, "width_mult": "0.25"}), "width_mult must be a positive number"),
    (_with(settings={**SETTINGS, "width_mult": [0.25]}), "width_mult must be a positive number"),
    (_with(settings={}), "does not fit VGGSmall"),
    (_with(model="resnet20"), "does not fit ResNet"),
    (_with(input_shape=[3, 8, 8], mean=[0.1] * 3, std=[1.0] * 3), "input_shape = (3, 8, 8)"),
    (_with(input_shape=[1, 4, 4]), "at least 8x8 pixels"),
    (_with(input_shape=[1, 2**14, 2**14]), "a layer makes"),
    (_changed(None), "None cannot be replaced"),
    (_changed("stages"), "None cannot be replaced"),
    (_changed({"path": ""}), "'' cannot be replaced"),
    (_changed({"path": 3, **CONV}), "3 cannot be replaced"),
    (_changed({"path": "__class__", **CONV}), "'__class__' cannot be replaced"),
    (_changed({"path": "stages.0.0.0"}), "no description of a module"),
    (_changed({"path": "stages.0.0.0", "same_as": ""}), "'' was not replaced before"),
    (_changed({"path": "stages.0.0.0", "same_as": ["a"]}), "['a'] was not replaced before"),
    (_changed({"path": "stages.0.0.0", "same_as": "stages"}), "'stages' was not replaced before"),
    (_changed({"path": "stages.0.0.0", **CONV, "kind": ["Conv2d"]}), "no description of a module"),
    (_changed({"path": "stages.0.0.0", **CONV, "kind": "Linear"}), "no description of a module"),
    (_changed({"path": "stages.0.0.0", **CONV, "arguments": None}), "no description of a module"),
    (_changed({"path": "stages.0.0.0", **CONV, "children": None}), "no description of a module"),
    (_changed({"path": "stages.0.0.0", **CONV, "children": {"forward": CONV}}), "no description of a module"),
    (_changed({"path": "stages.0.0.0", **CONV, "children": {"__class__": CONV}}), "no description of a module"),
    (_conv(out_channels=2**30), "does not fit VGGSmall"),
    (_conv(out_channels=2**31), "no description of a module"),
    (_conv(in_channels=2**31 - 1, out_channels=2**31 - 1, kernel_size=1024), "no description of a module"),
    (_conv(kernel_size=10**9), "no description of a module"),
    (_conv(kernel_size=[3] * 1000), "no description of a module"),
    (_conv(padding=10**6), "no description of a module"),
    (_conv(padding=[0, 2000]), "no description of a module"),
    (_conv(padding=[1, True]), "no description of a module"),
    (_conv(padding="anywhere"), "no description of a module"),
    (_conv(padding_mode="os.system"), "no description of a module"),
    (_conv(bias=1), "no description of a module"),
    (_conv(device="cuda"), "no description of a module"),
    (_conv(dtype="float64"), "no description of a module"),
    (_conv(groups=0), "no description of a module"),
    (_conv(out_channels=8.0), "no description of a module"),
    (_separable(depthwise=None), "no description of a module"),
    (_separable(depthwise=CONV), "no description of a module"),
    (_separable(activation=CONV), "no description of a module"),
    (_separable(forward=CONV), "no description of a module"),
    (_separable(__class___norm=CONV), "no description of a module"),
    (_separable(pointwise_norm=SEPARABLE), "no description of a module"),
    (_with(changes=[{"path": "stages.0.0.0", **CONV}] * 2), "was replaced before"),
    (
        _with(
            changes=[
                {"path": "stages.0", "kind": "Sequential", "arguments": {}, "children": {}},
                {"path": "stages.0.0", "same_as": "stages.0"},
            ]
        ),
        "was replaced before",
    ),
]


@pytest.mark.parametrize(("description", "message"), UNTRUE, ids=lambda one: str(one)[-60:].replace("/", ""))
def test_file_that_does_not_hold_what_it_describes(tmp_path: Path, description: Any, message: str) -> None:
    path = _file(tmp_path / FILE, description)
    sepconv("count", tmp_path).failed_with(2, f"{path} does not hold the network that it describes", message)


def test_many_layers_are_refused_by_their_number(tmp_path: Path) -> None:
    layers = {str(i): {"kind": "Identity", "arguments": {}, "children": {}} for i in range(1000)}
    _file(tmp_path / FILE, _changed({"path": "stages.0", "kind": "Sequential", "arguments": {}, "children": layers}))
    sepconv("count", tmp_path).failed_with(2, "no description of a module")
    arguments = {**SEPARABLE["arguments"], "pointwise_layers": 10**6}
    _file(tmp_path / FILE, _changed({"path": "stages.0.0.0", **SEPARABLE, "arguments": arguments}))
    sepconv("count", tmp_path).failed_with(2, "no description of a module", "pointwise_layers")


def test_refused_before_anything_of_that_size_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the description says, the initialiser sees no tensors with data before it is found untrue."""
    seen: list[str] = []
    normal = nn.init.kaiming_normal_
    monkeypatch.setattr(
        nn.init, "kaiming_normal_", lambda tensor, **how: seen.append(tensor.device.type) or normal(tensor, **how)
    )
    _file(tmp_path / FILE, _with(settings={**SETTINGS, "num_classes": 10**12}))
    seen.clear()
    with pytest.raises(ValueError, match="does not fit VGGSmall"):
        open_model(str(tmp_path))
    assert set(seen) == {"meta"}


def test_settings_beyond_the_memory_are_refused_without_a_file() -> None:
    ran = sepconv("count", "vgg_small", "--set", "num_classes=1000000000000", "--input", "3x8x8")
    ran.failed_with(2, "VGGSmall", "more than the", "MB of this machine")


def test_prediction_by_a_zero_deviation_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png.encode(torch.zeros(1, 8, 8, dtype=torch.uint8)))
    path = _file(tmp_path / FILE, _with(std=[0.0]))
    sepconv("predict", path, tmp_path / "a.png").failed_with(2, "std must be a list of finite numbers above 0")


@pytest.mark.parametrize(
    "settings",
    [
        {"a": object()},
        {"a": {"b": 1}},
        {"a": float("nan")},
        {"a": np.float32(0.5)},
        {"a": lambda: 0},
        {"a": [[1]]},
        {1: 1},
    ],
)
def test_what_could_not_be_read_is_not_written(tmp_path: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="cannot be saved: the settings of vgg_small must be numbers, text"):
        write(tmp_path / FILE, GOOD.build(), Card("vgg_small", settings))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "again"),
    [
        ({"a": 1, "b": 0.5, "c": "d", "e": None, "f": True}, {"a": 1, "b": 0.5, "c": "d", "e": None, "f": True}),
        ({"a": (1, 2), "b": [0.5, "x", None]}, {"a": [1, 2], "b": [0.5, "x", None]}),
        ({"a": np.int64(3), "b": np.float64(0.5)}, {"a": 3, "b": 0.5}),
    ],
)
def test_plain_settings_survive(settings: dict[str, Any], again: dict[str, Any]) -> None:
    assert from_text(Card("net:f", settings).to_text()) == Card("net:f", again)


@pytest.mark.parametrize("name", [name for name in models.BUILT_IN if name not in ("resnet56", "resnet110")])
def test_every_built_in_model_opens_without_trust(tmp_path: Path, name: str) -> None:
    settings = {"width_mult": 0.1, "num_classes": 3, "in_channels": 1}
    card = Card(name, settings, [], (1, 40, 40), ["a", "b", "c"], [0.5], [1.0], "d")
    write(tmp_path / FILE, card.build(), card)
    assert open_model(str(tmp_path))[1] == card


class TestWhatIsNoFile:
    OPENERS: tuple[Callable[[Path], Any], ...] = (
        read_card,
        lambda path: open_model("vgg_small", path),
        lambda path: open_model(str(path)),
        lambda path: models.load_weights(GOOD.build(), path),
    )

    @pytest.mark.parametrize("opener", OPENERS, ids=["read_card", "weights", "model", "load_weights"])
    def test_pipe_and_device_do_not_wait_for_anybody(self, tmp_path: Path, opener: Callable[[Path], Any]) -> None:
        pipe = tmp_path / "pipe.safetensors"
        os.mkfifo(pipe)
        device = tmp_path / "device.safetensors"
        device.symlink_to("/dev/zero")
        for path in (pipe, device):
            with pytest.raises(ValueError, match=rf"cannot read {path}: it is no regular file"):
                opener(path)
        with pytest.raises(ValueError, match=r"cannot read .*none\.safetensors: No such file"):
            opener(tmp_path / "none.safetensors")

    @pytest.mark.parametrize("weights", ["/dev/null", "/dev/zero", "/dev/stdin", "/"])
    def test_on_the_command_line(self, weights: str) -> None:
        ran = sepconv("count", "vgg_small", "--weights", weights, "--input", "3x8x8")
        ran.failed_with(2, f"cannot read {weights}")
