"""What is typed at the command line and cannot be meant: one line that names the option, before any work."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_run import sepconv
from torch import nn

from sepconv.cli import arguments, console, jobs, options
from sepconv.cli.app import app
from sepconv.compile import compile
from sepconv.kernels.halide.schedule.peak import fma_peak_gflops
from sepconv.system import files
from sepconv.system.threads import threads_set_to
from sepconv.train import Recipe

TRAIN = ("train", "vgg_small", "--data", "digits", "--out", "out")
CONVERT = ("convert", "vgg_small", "--data", "digits", "--out", "out")
COUNT = ("count", "vgg_small", "--input", "3x8x8")
TUNE = ("bench", "tune", "vgg_small", "--input", "3x8x8")
OPS = ("bench", "ops", "--json", "ops.json")


@pytest.fixture(autouse=True)
def _nothing_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Each command line here is refused before data are read, and nothing is left of it."""

    def load(*asked: Any, **how: Any) -> None:
        raise AssertionError("data were read")

    monkeypatch.setattr(jobs, "load", load)
    monkeypatch.chdir(tmp_path)
    yield
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words",
    [
        ("count", ""),
        ("train", "", *TRAIN[2:]),
        ("predict", "vgg_small", ""),
        ("predict", "vgg_small", "a.png", "--data", ""),
        ("report", ""),
        (*TRAIN[:2], "--data", "", "--out", "out"),
        (*TRAIN[:2], "--data=", "--out", "out"),
        (*TRAIN[:4], "--out", ""),
        ("demo", "--out="),
        (*COUNT, "--weights", ""),
        (*COUNT, "--json", ""),
        (*TRAIN, "--json", ""),
        ("doctor", "--json="),
        ("export", "vgg_small", "--onnx", "", "--input", "3x8x8"),
        ("bench", "ops", "--json", ""),
    ],
)
def test_empty_words(words: tuple[str, ...]) -> None:
    sepconv(*words).failed_with(2, "it must not be empty")


@pytest.mark.parametrize("option", ["--out", "--seed", "--data", "--json"])
def test_options_that_are_given_twice(option: str) -> None:
    ran = sepconv("train", "vgg_small", option, "1", f"{option}=1")
    ran.failed_with(2, f"'{option}'", "it is given more than once")


def test_every_command_refuses_what_is_given_twice() -> None:
    for group in (app, *(one.typer_instance for one in app.registered_groups)):
        assert all(command.cls is not None for command in group.registered_commands)


def test_what_may_be_repeated() -> None:
    assert sepconv(*COUNT, "--set", "width_mult=0.1", "--set", "num_classes=3", "-q", "-q").code == 0
    sepconv(*COUNT, "--set", "width_mult=0.1", "--set", "width_mult=0.2").failed_with(2, "--set gives width_mult twice")


NUMBERS = [
    (TRAIN, "--seed", ("-1", str(2**63), "1e3", "nan")),
    (CONVERT, "--seed", ("-1", str(10**30))),
    (("demo",), "--seed", ("-1", str(2**64))),
    (TRAIN, "--threads", ("0", "-1", "100000", str(10**30))),
    (CONVERT, "--threads", ("100000",)),
    (("demo",), "--threads", ("100000",)),
    (TUNE, "--threads", ("²", "1,²", "100000", "٣", "9" * 5000, "1,0", "nan")),
    (OPS, "--threads", ("²", "2,100000", "\uff11")),
    (("bench", "network", "--json", "n.json"), "--threads", ("²", "100000")),
    (("bench", "blocks", "--json", "b.json"), "--threads", ("²", "100000")),
    (OPS, "--seconds", ("nan", "inf", "0", "-1", "1e999")),
    (TUNE, "--seconds", ("nan", "inf", "0", "-1")),
    (("bench", "network", "--json", "n.json"), "--seconds", ("nan", "-inf", "0")),
    (TUNE, "--batch", ("0", "-1", "1000000000000")),
    (CONVERT, "--batch", ("0", "1000000000000")),
    (TRAIN, "--epochs", ("0", "-1", "1000000000", "nan", "1.5")),
    (CONVERT, "--epochs", ("-1", "1000000000")),
    (TRAIN, "--batch-size", ("0", "-1", "nan")),
    (TRAIN, "--lr", ("nan", "inf", "0", "-1", "1e999")),
    (CONVERT, "--lr", ("nan", "-1")),
    (TRAIN, "--weight-decay", ("nan", "inf", "-1")),
    (TRAIN, "--label-smoothing", ("nan", "1", "-1")),
    (TRAIN, "--mixup", ("nan", "inf", "-1")),
    (TRAIN, "--cutmix", ("nan", "inf", "-1")),
    (TRAIN, "--average", ("nan", "1", "-1")),
    (TRAIN, "--crop-padding", ("-1", "nan")),
    (TRAIN, "--cutout", ("-1", "nan")),
    (TRAIN, "--image-size", ("0", "-1", "1000000000")),
    (CONVERT, "--temperature", ("nan", "inf", "0", "-1")),
    (CONVERT, "--alpha", ("nan", "-0.1", "1.1")),
    (CONVERT, "--calibration-images", ("0", "-1")),
    (CONVERT, "--budget", ("nan", "inf", "1/0", "0/0", "1e999999999", "1e-999999999", "1/1e999999999", "1/", "1/2/3")),
    (("predict", "vgg_small", "a.png"), "--top", ("0", "-1", "nan")),
    (
        ("count", "vgg_small"),
        "--input",
        (
            "3x1000000x1000000",
            "x".join(["2"] * 100),
            "3x²x8",
            "\uff13x8x8",
            "3x" + "9" * 5000,
            "3xnanx8",
            "3x1e3x8",
            "3x+8x8",
            "3x 8x8",
        ),
    ),
    (("bench", "tune", "vgg_small"), "--input", ("3x1000000x1000000",)),
    (("export", "vgg_small", "--onnx", "a.onnx"), "--input", ("3x1000000x1000000",)),
]


@pytest.mark.parametrize(
    ("words", "option", "value"),
    [(words, option, value) for words, option, values in NUMBERS for value in values],
    ids=lambda one: one[:12] if isinstance(one, str) else one[0],
)
def test_numbers_that_cannot_be_meant(words: tuple[str, ...], option: str, value: str) -> None:
    name = {"--average": "ema"}.get(option, option.lstrip("-").replace("-", "_"))
    ran = sepconv(*words, f"{option}={value}")
    ran.failed_with(2)
    assert option in ran.err or name in ran.err


@pytest.mark.parametrize(
    ("setting", "rule"),
    [
        ("width_mult=nan", "width_mult must be a positive number"),
        ("width_mult=1e999", "width_mult must be a positive number"),
        ("width_mult=1e308", "cannot be built"),
        ("width_mult=1e6", "more than the"),
        ("num_classes=²", "num_classes must be a positive integer"),
        ("num_classes=" + "9" * 5000, "num_classes must be a positive integer"),
        ("dropout=" + "(" * 300, "dropout must be"),
        ("dropout=nan", "dropout must be"),
        ("²=1", "--set needs key=value"),
        ("=1", "--set needs key=value"),
    ],
)
def test_settings_that_cannot_be_meant(setting: str, rule: str) -> None:
    sepconv(*COUNT, "--set", setting).failed_with(2, rule)


@pytest.mark.parametrize("count", [0, -1, 1025, 100_000, 10**30, 1.5, "2", True])
def test_threads_of_the_functions(count: Any) -> None:
    before = torch.get_num_threads()
    with pytest.raises(ValueError, match="threads must be a positive integer"), threads_set_to(count):
        pass
    if not isinstance(count, str):
        with pytest.raises(ValueError, match="threads"):
            fma_peak_gflops(count)
    if count is not True:
        with pytest.raises(ValueError, match="compile: threads must be None or a positive integer"):
            compile(nn.Conv2d(1, 1, 1).eval(), torch.zeros(1, 1, 2, 2), threads=count)
    assert torch.get_num_threads() == before


def test_epochs_of_the_functions() -> None:
    with pytest.raises(ValueError, match="epochs must be at least 1 and at most 99999 but is 100000"):
        Recipe(epochs=100_000)


class TestOutputs:
    @pytest.mark.parametrize("words", [COUNT, TRAIN, CONVERT, TUNE, ("doctor",), ("demo",), ("bench", "ops")])
    @pytest.mark.parametrize("place", ["/", "/dev/null/a.json", "/proc/a.json", "/dev/fd/987"])
    def test_json_where_none_can_be_is_refused_first(self, words: tuple[str, ...], place: str) -> None:
        sepconv(*words, "--json", place).failed_with(1, "cannot write")

    @pytest.mark.parametrize("place", ["/", "/dev/null/a.onnx"])
    def test_onnx_where_none_can_be(self, place: str) -> None:
        sepconv("export", "vgg_small", "--input", "3x8x8", "--onnx", place).failed_with(1, "cannot write")

    @pytest.mark.parametrize("words", [TRAIN[:4], CONVERT[:4], ("demo",)])
    def test_out_where_none_can_be(self, words: tuple[str, ...]) -> None:
        for place in ("/dev/null", "/dev/null/out", "/proc/out"):
            sepconv(*words, "--out", place).failed_with(1, f"cannot write to the folder {place}")

    def test_devices(self) -> None:
        assert sepconv(*COUNT, "--json", "/dev/null").code == 0
        sepconv(*COUNT, "--json", "/dev/full").failed_with(1, "cannot write /dev/full: No space left")
        sepconv("bench", "ops", "--json", "/dev/null").failed_with(2, "--json must be a file")
        assert Path("/dev/null").is_char_device()
        assert Path("/dev/full").is_char_device()

    @pytest.mark.slow
    @pytest.mark.skipif(os.name != "posix", reason="a shell's process substitution")
    def test_process_substitution_and_redirection(self, tmp_path: Path) -> None:
        command = f"{sys.executable} -m sepconv {' '.join(COUNT)} -q --json"
        done = subprocess.run(
            ["bash", "-c", f"{command} >(cat) && {command} /dev/stdout | wc -c"],
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.count('"model": "vgg_small"') == 1
        assert done.stdout.splitlines()[-1].isdigit()


@pytest.mark.parametrize("quiet", [False, True])
@pytest.mark.parametrize("source", [".", "digits"])
def test_what_takes_long_says_what_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, quiet: bool
) -> None:
    class Soon(console.Timer):
        """Takes no time."""

        def start(self) -> None:
            self.function(*self.args, **self.kwargs)

    def load(*asked: Any, **how: Any) -> None:
        raise ValueError("enough")

    monkeypatch.setattr(console, "Timer", Soon)
    monkeypatch.setattr(jobs, "load", load)
    out = tmp_path.with_name("out of " + tmp_path.name)
    ran = sepconv("train", "vgg_small", "--data", source, "--out", out, *(("-q",) if quiet else ()))
    doing = "Reading digits ..." if source == "digits" else f"Looking for images below {tmp_path} ..."
    assert ran.err.splitlines() == [*([] if quiet else [doing]), "sepconv: enough"]
    assert not out.exists()


def test_literals_that_are_none_are_text() -> None:
    for text in ("(" * 300, "9" * 5000, "[" * 10_000, "²", "1 +", "a b"):
        assert arguments.parse_settings([f"a={text}"]) == {"a": text}


def test_bounds_are_those_that_torch_takes() -> None:
    torch.manual_seed(options.LARGEST_SEED)
    assert files.nearest_folder(Path("a/b")) == Path.cwd()
