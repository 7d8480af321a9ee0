"""Networks as C libraries: they compute what the model does, by themselves, and say clearly what cannot be."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import device_run
import pytest
import torch
from device_run import (
    EXAMPLE,
    MEAN,
    STD,
    answer,
    at,
    close,
    described,
    exported,
    loaded,
    native,
    needs,
    normalised,
    small,
)
from networks import NETWORKS, randomise
from quantizable import with_statistics
from random_networks import RandomNetwork
from torch import Tensor, nn
from torch.nn import functional as F

import sepconv
from sepconv.device import files, targets

SANITIZED = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g")


def test_wrong_pointers_are_refused(tmp_path: Path) -> None:
    library = loaded(exported(native()), "small", tmp_path)
    out, memory = torch.empty(5), torch.empty(1 << 20, dtype=torch.uint8)
    assert library.small_run(None, at(out)) == -1
    assert library.small_run(at(EXAMPLE), None) == -1
    assert library.small_run_in(ctypes.c_void_p(memory.data_ptr() // 64 * 64 + 65), at(EXAMPLE), at(out)) == -1


def test_images_of_bytes_are_normalised_as_the_network_was_trained(tmp_path: Path) -> None:
    library = loaded(exported(native()), "small", tmp_path)
    pixels, out = torch.randint(0, 256, (13, 11, 3), dtype=torch.uint8), torch.empty(1, 5)
    assert library.small_run_image(at(pixels), at(out)) == 0
    close(out, answer(normalised(pixels)))
    names = (ctypes.c_char_p * 5).in_dll(library, "small_classes")
    assert [name.decode() for name in names] == ["a", "b", "c", "d", "e"]


def test_example_runs_without_malloc_and_under_sanitizers(tmp_path: Path) -> None:
    """The C part has no warning and no undefined behaviour; a malloc that aborts is never called by a network."""
    target = targets.TARGETS[native()]
    folder = exported(target.name)
    source = tmp_path / "strict.c"
    source.write_text(
        '#include "small.h"\n#include <stdlib.h>\n#include <stdio.h>\n'
        "static float in[SMALL_INPUT_SIZE], out[SMALL_OUTPUT_SIZE];\n"
        "static int inside;\nextern void *__libc_malloc(size_t);\n"
        "void *malloc(size_t size) { if (inside) abort(); return __libc_malloc(size); }\n"
        "int main(void) { int code; inside = 1; code = small_run(in, out); inside = 0; return code; }\n"
    )
    warnings = ["-std=c99", "-Wall", "-Wextra", "-Werror"]
    link = ["-I", str(folder), "-L", str(folder), "-lsmall", "-lm"]
    subprocess.run(["gcc", *warnings, str(source), "-o", str(tmp_path / "strict"), *link], check=True)
    subprocess.run([str(tmp_path / "strict")], check=True)
    library = described(folder, target.name)
    program = tmp_path / "example"
    device_run.check.build(library, target, program, *SANITIZED)
    [got] = device_run.check.answers(library, target, program, [EXAMPLE])
    close(got, answer())
    pixels = torch.randint(0, 256, (13, 11, 3), dtype=torch.uint8)
    (tmp_path / "image.ppm").write_bytes(b"P6\n11 13\n255\n" + pixels.numpy().tobytes())
    done = subprocess.run([program, tmp_path / "image.ppm"], capture_output=True, text=True, check=True)
    lines = [line.split() for line in done.stdout.splitlines()]
    close(torch.tensor([[float(number) for number, _ in lines]]), answer(normalised(pixels)))
    assert [name for _, name in lines] == ["a", "b", "c", "d", "e"]
    (tmp_path / "small.ppm").write_bytes(b"P6\n4 4\n255\n" + bytes(48))
    done = subprocess.run([program, tmp_path / "small.ppm"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "the image must have 11 x 13 pixels\n")


def test_header_serves_c_plus_plus(tmp_path: Path) -> None:
    device_run.needs_program("g++")
    source = tmp_path / "uses.cpp"
    source.write_text(
        '#include "small.h"\nint main() { return small_run(nullptr, nullptr) == SMALL_REFUSED ? 0 : 1; }\n'
    )
    folder = exported(native())
    build = ["g++", "-Wall", "-Wextra", "-Werror", str(source), "-o", str(tmp_path / "uses"), "-I", str(folder)]
    subprocess.run([*build, "-L", str(folder), "-lsmall", "-lm"], check=True)
    subprocess.run([str(tmp_path / "uses")], check=True)


SLOW = [pytest.param(target, marks=pytest.mark.slow) for target in ("x86-64-linux-avx2", "wasm-32-scalar")]


@pytest.mark.parametrize("target", ["x86-64-linux", "arm-64-linux", "wasm-32", *SLOW])
def test_small_network_on_each_target(target: str, tmp_path: Path) -> None:
    needs(target)
    folder = exported(target)
    goal, library, program = targets.TARGETS[target], described(folder, target), tmp_path / "example"
    device_run.check.build(library, goal, program)
    [got] = device_run.check.answers(library, goal, program, [EXAMPLE])
    close(got, answer())


@pytest.mark.parametrize("target", ["arm-64-android", "arm-64-osx"])
@pytest.mark.slow
def test_other_systems_get_objects_of_their_kind(target: str) -> None:
    content = (exported(target) / "libsmall.a").read_bytes()
    assert content.startswith(b"!<arch>\n")
    magic = b"\xcf\xfa\xed\xfe" if target.endswith("osx") else b"\x7fELF"
    assert magic in content[:4096]
    assert (exported(target) / "small.o").exists() == (not target.endswith("osx"))


@pytest.mark.slow
def test_code_for_android_computes_the_answer(tmp_path: Path) -> None:
    """Linked with the C library of another Linux, since it needs nothing of Android's but what every one has."""
    needs("arm-64-linux")
    folder, goal = exported("arm-64-android"), targets.TARGETS["arm-64-linux"]
    library, program = described(folder, "arm-64-android"), tmp_path / "example"
    device_run.check.build(library, goal, program)
    [got] = device_run.check.answers(library, goal, program, [EXAMPLE])
    close(got, answer())


def quantized() -> nn.Module:
    found, _ = sepconv.quantize(small(), torch.randn(16, *EXAMPLE.shape[1:]))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("target", ["x86-64-linux-avx2", "arm-64-linux", "arm-64-linux-dotprod", "wasm-32"])
def test_int8_on_each_target(target: str, tmp_path: Path) -> None:
    needs(target)
    library = sepconv.export_c(quantized(), EXAMPLE, tmp_path, target=target, check=True)
    assert library.precision == "int8"
    assert library.checked.startswith("the example gives the model's answer")
    if target.endswith("dotprod"):
        found = subprocess.run(
            ["aarch64-linux-gnu-objdump", "-d", tmp_path / "libmodel.a"], capture_output=True, text=True, check=True
        )
        assert "sdot" in found.stdout


@pytest.mark.slow
def test_code_of_a_small_mobilenet_in_int8_takes_few_bytes(tmp_path: Path) -> None:
    """All objects but the weights, tables of symbols included; for a Raspberry Pi 5."""
    model: nn.Module = with_statistics(sepconv.models.MobileNetV1(0.25))
    found, _ = sepconv.quantize(model, torch.randn(16, 3, 128, 128))
    library = sepconv.export_c(found, torch.randn(1, 3, 128, 128), tmp_path, target="arm-64-linux-dotprod")
    assert library.precision == "int8"
    assert library.code_bytes <= 300_000
    assert library.weights_bytes < 600_000


@pytest.mark.slow
def test_images_of_bytes_in_node(tmp_path: Path) -> None:
    """Pixels with and without alpha; the module is short."""
    needs("wasm-32")
    folder = exported("wasm-32")
    assert len((folder / "small.mjs").read_text().splitlines()) <= 60
    pixels = torch.randint(0, 256, (13, 11, 4), dtype=torch.uint8)
    (tmp_path / "pixels").write_bytes(pixels.numpy().tobytes())
    (tmp_path / "run.mjs").write_text(
        f'import {{ load }} from "{(folder / "small.mjs").as_uri()}";\n'
        'import { readFileSync } from "node:fs";\n'
        f'const all = new Uint8Array(readFileSync("{tmp_path / "pixels"}")), network = await load();\n'
        "console.log(JSON.stringify([...network.runImage(all)]));\n"
        "console.log(JSON.stringify([...network.runImage(all.filter((_, i) => i % 4 < 3))]));\n"
    )
    done = subprocess.run(["node", tmp_path / "run.mjs"], capture_output=True, text=True, check=True)
    for line in done.stdout.splitlines():
        close(torch.tensor([json.loads(line)]), answer(normalised(pixels[..., :3])))


@pytest.fixture
def sanitized(monkeypatch: pytest.MonkeyPatch) -> None:
    """Examples are built so that they end at undefined behaviour, and at memory that is not theirs."""
    monkeypatch.setattr(device_run.check, "WARNINGS", (*device_run.check.WARNINGS, *SANITIZED))


@pytest.mark.slow
@pytest.mark.usefixtures("sanitized")
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_compile_run_or_are_refused_by_name(name: str, tmp_path: Path) -> None:
    make, inputs = NETWORKS[name]
    _exports_or_says_why(randomise(make()), inputs(), tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("sanitized")
@pytest.mark.parametrize("seed", range(24))
def test_random_networks_run_or_are_refused_by_name(seed: int, tmp_path: Path) -> None:
    network = RandomNetwork(seed)
    _exports_or_says_why(network, network.example, tmp_path, threads=1 + seed % 3)


def _exports_or_says_why(model: nn.Module, example: Any, folder: Path, threads: int = 1) -> None:
    """What has no kernel is refused, and nothing else; what PyTorch only computes faster can be exported."""
    explained = sepconv.compile(model, example, threads=threads).explain()
    torchs = [group for group in explained.groups if group.kernel == "torch"]
    said, checked = "", ""
    try:
        checked = sepconv.export_c(model, example, folder / "out", target=native(), threads=threads, check=True).checked
    except ValueError as error:
        said = str(error)
    whole = "must be float32 tensors" in said
    assert said == "" or whole or "no kernel computes a" in said
    assert whole or (bool(torchs) if said else all("no kernel for" not in group.reason for group in torchs))
    assert checked.startswith("the example gives the model's answer") == (said == "")
    assert (folder / "out").exists() == (said == "")


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
        self.sampled = _Sampled()

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.sampled(self.inner(x))
        return found


class _Sampled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.grid_sample(x, torch.zeros(len(x), 4, 4, 2), align_corners=False)


def test_operations_without_a_kernel_are_named_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"export_c: no kernel computes aten\.grid_sampler_2d\.default in sampled"):
        sepconv.export_c(Odd().eval(), torch.randn(1, 3, 8, 8), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_convolutions_without_a_kernel_are_called_so(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Conv3d(3, 4, 3), nn.ReLU()).eval(), torch.randn(1, 3, 5, 5, 5)
    with pytest.raises(
        ValueError, match=r"no kernel computes a normal convolution in 0 \(.* got 3 spatial dimensions\)"
    ):
        sepconv.export_c(model, x, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": "arm-32"}, "export_c: target must be one of x86-64-linux, "),
        ({"name": "a-b"}, "export_c: name must be a C identifier"),
        ({"name": "c"}, "export_c: name must not be that of a library or header of C, got 'c'"),
        ({"name": "String"}, "export_c: name must not be that of a library or header of C, got 'String'"),
        ({"threads": 0}, "export_c: threads must be from 1 to 64, got 0"),
        ({"threads": 65}, "export_c: threads must be from 1 to 64, got 65"),
        ({"threads": 2, "target": "wasm-32"}, "export_c: threads must be 1, since wasm-32 has none, got 2"),
        ({"classes": ["a\nb"]}, "export_c: the names of classes must be single lines"),
        ({"mean": [0.5]}, "export_c: mean and std must have a number for each channel"),
        ({"mean": [0.5], "std": [0.5]}, "of one image, got 1 for inputs of"),
    ],
)
def test_wrong_arguments(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        sepconv.export_c(small(), EXAMPLE, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: (small(), torch.randn(1, 4, 13, 11)), ValueError, "export_c: the model does not accept inputs"),
        (lambda: (nn.Conv2d(3, 4, 1), EXAMPLE), ValueError, "export_c: the model is in training mode"),
        (lambda: ("mobilenet", EXAMPLE), TypeError, "export_c: model must be a torch.nn.Module"),
        (lambda: (nn.ReLU().eval(), torch.ones(3, dtype=torch.int64)), ValueError, "inputs must be float32 tensors"),
        (
            lambda: (sepconv.compile(small(), EXAMPLE, precision="bfloat16"), EXAMPLE),
            ValueError,
            "compiled for bfloat16",
        ),
    ],
)
def test_wrong_models(
    make: Callable[[], tuple[Any, Tensor]], error: type[Exception], message: str, tmp_path: Path
) -> None:
    model, example = make()
    with pytest.raises(error, match=message):
        sepconv.export_c(model, example, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folders_that_cannot_or_should_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write to the folder"):
        sepconv.export_c(small(), EXAMPLE, tmp_path / "file" / "out")
    if os.geteuid():
        (tmp_path / "closed").mkdir(mode=0o500)
        with pytest.raises(OSError, match="cannot write to the folder"):
            sepconv.export_c(small(), EXAMPLE, tmp_path / "closed" / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "README.md").write_text("mine")
    with pytest.raises(ValueError, match="holds other files"):
        sepconv.export_c(small(), EXAMPLE, tmp_path / "full")


def test_a_library_is_replaced_by_the_next(tmp_path: Path) -> None:
    """The same network gives the same bytes."""
    found = []
    for _ in range(2):
        sepconv.export_c(small(), EXAMPLE, tmp_path / "out", target=native())
        found.append((tmp_path / "out" / "libmodel.a").read_bytes())
    assert found[0] == found[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_files_of_a_library_go_with_it_and_no_others(tmp_path: Path) -> None:
    """Of another name, and what a manifest from elsewhere lists outside of the folder."""
    folder, kept = tmp_path / "out", {"mine.c", "manifest.json"}
    facts = {"sha256": "", "arena_bytes": 0, "files": ["old.h", "libold.a", "../outside", "sub", 7, "manifest.json"]}
    files.write(folder, {"old.h": b"", "libold.a": b"", files.MANIFEST: json.dumps(facts).encode()})
    (folder / "mine.c").write_text("")
    (tmp_path / "outside").write_text("")
    files.check_folder(folder)
    files.write(folder, {"new.h": b"", files.MANIFEST: b"{}"})
    assert {path.name for path in folder.iterdir()} == {"new.h", *kept}
    assert (tmp_path / "outside").exists()


def test_the_manifest_lists_every_file() -> None:
    folder = exported(native())
    listed = json.loads((folder / "manifest.json").read_text())["files"]
    assert set(listed) == {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("target", ["native", "arm-64-linux"])
def test_compiled_networks_give_the_same_library(target: str, tmp_path: Path) -> None:
    """What was prepared for this machine is left alone."""
    target = native() if target == "native" else target
    fast = sepconv.compile(small(), EXAMPLE, threads=1)
    before = fast(EXAMPLE)
    settings: dict[str, Any] = {"name": "small", "mean": MEAN, "std": STD, "classes": ["a", "b", "c", "d", "e"]}
    sepconv.export_c(fast, EXAMPLE, tmp_path / "out", target=target, **settings)
    library = (tmp_path / "out" / "libsmall.a").read_bytes()
    assert library == (exported(target) / "libsmall.a").read_bytes()
    assert torch.equal(fast(EXAMPLE), before)


def test_channels_of_blue_green_red(tmp_path: Path) -> None:
    sepconv.export_c(small(), EXAMPLE, tmp_path, target=native(), mean=MEAN, std=STD, bgr=True)
    library = loaded(tmp_path, "model", tmp_path)
    pixels, out = torch.randint(0, 256, (13, 11, 3), dtype=torch.uint8), torch.empty(1, 5)
    assert library.model_run_image(at(pixels), at(out)) == 0
    close(out, answer(normalised(pixels.flip(2))))


def test_batches_run_image_by_image_as_in_compile(tmp_path: Path) -> None:
    """Large first layers in slices, several inputs and outputs, results in other layouts."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.next = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 8, 3, 2, 1)

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            first = self.next(self.stem(x).relu()).relu()
            return first, first + y

    torch.manual_seed(0)
    model: nn.Module = with_statistics(Pair())
    example = torch.randn(5, 3, 140, 140), torch.randn(5, 8, 70, 70)
    library = sepconv.export_c(model, example, tmp_path, target=native(), check=True)
    assert library.outputs == ((5, 8, 70, 70), (5, 8, 70, 70))
    assert library.checked.startswith("the example gives the model's answer")
