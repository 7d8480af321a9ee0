"""Calls of libraries in programs: what they write, the threads they start, several networks and callers at once."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shlex
import shutil
import subprocess
import threading
from pathlib import Path

import device_run
import pytest
import torch
from device_run import EXAMPLE, answer, at, close, described, exported, loaded, native, needs
from torch import Tensor

from sepconv.device import loops, targets

GUARD = 256
ALONE, SHARED = ("small", 1), ("shared", 3)
"""A library of one thread and one of several: name and threads."""
# Prints how many threads two calls asked for, started and joined, then the numbers.
COUNTED = """
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include "shared.h"
static float in[SHARED_INPUT_SIZE], out[SHARED_OUTPUT_SIZE];
static int asked, started, joined, most;
extern int __real_pthread_create(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);
extern int __real_pthread_join(pthread_t, void **);
extern int __wrap_pthread_create(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);
extern int __wrap_pthread_join(pthread_t, void **);
int __wrap_pthread_create(pthread_t *thread, const pthread_attr_t *kind, void *(*run)(void *), void *given) {
  asked++;
  if (started - joined >= most) return 11;
  started++;
  return __real_pthread_create(thread, kind, run, given);
}
int __wrap_pthread_join(pthread_t thread, void **result) {
  joined++;
  return __real_pthread_join(thread, result);
}
int main(int count, char **arguments) {
  FILE *file = fopen(arguments[1], "rb");
  int i;
  most = count > 2 ? atoi(arguments[2]) : 0;
  if (!file || fread(in, sizeof in, 1, file) != 1) return 1;
  for (i = 0; i < 2; i++) if (shared_run(in, out)) return 2;
  printf("%d %d %d\\n", asked, started, joined);
  for (i = 0; i < SHARED_OUTPUT_SIZE; i++) printf("%.9g\\n", out[i]);
  return 0;
}
"""
# Two threads, each with an arena of its own, call the same network.
CALLERS = """
#include <pthread.h>
#include <string.h>
#include "{name}.h"
static _Alignas(64) unsigned char arenas[2][{upper}_ARENA_BYTES];
static float in[{upper}_INPUT_SIZE], out[2][{upper}_OUTPUT_SIZE];
static void *run(void *number) {{
  int i, me = *(int *)number;
  for (i = 0; i < 20; i++) if ({name}_run_in(arenas[me], in, out[me])) return number;
  return 0;
}}
int main(void) {{
  pthread_t threads[2];
  int numbers[2] = {{0, 1}}, i, failed = 0;
  void *result;
  for (i = 0; i < {upper}_INPUT_SIZE; i++) in[i] = (float)(i % 7) - 3;
  for (i = 0; i < 2; i++) if (pthread_create(&threads[i], 0, run, &numbers[i])) return 3;
  for (i = 0; i < 2; i++) {{
    pthread_join(threads[i], &result);
    failed |= result != 0;
  }}
  return failed || memcmp(out[0], out[1], sizeof out[0]);
}}
"""


@pytest.mark.parametrize(("name", "threads"), [ALONE, SHARED])
def test_arena_alone_is_written(name: str, threads: int, tmp_path: Path) -> None:
    """A call in an arena full of NaN, between margins, gives the model's answer, twice the same bits."""
    folder = exported(native(), name, threads)
    run = getattr(loaded(folder, name, tmp_path), f"{name}_run_in")
    size = described(folder, native()).arena_bytes
    memory = torch.full((size + 2 * GUARD + 64,), 0xFF, dtype=torch.uint8)
    start = GUARD + -(memory.data_ptr() + GUARD) % 64
    outputs = torch.full((2, 5 + 2 * GUARD), float("nan"))
    for out in outputs:
        place = ctypes.c_void_p(memory.data_ptr() + start)
        assert run(place, at(EXAMPLE), ctypes.c_void_p(out.data_ptr() + 4 * GUARD)) == 0
    close(outputs[0, GUARD:-GUARD].view(1, 5), answer())
    assert torch.equal(outputs[0, GUARD:-GUARD], outputs[1, GUARD:-GUARD])
    assert bool((memory[:start] == 0xFF).all())
    assert bool((memory[start + size :] == 0xFF).all())
    assert bool(outputs[:, :GUARD].isnan().all())
    assert bool(outputs[:, -GUARD:].isnan().all())


def test_two_networks_and_four_threads_in_one_program(tmp_path: Path) -> None:
    """Two libraries link into one, from objects; each is called by two threads on two arenas, as if it were alone."""
    folders = [exported(native(), *which) for which in (ALONE, SHARED)]
    program = tmp_path / "both.so"
    objects = [str(folder / f"{name}.o") for folder, (name, _) in zip(folders, (ALONE, SHARED), strict=True)]
    subprocess.run(["gcc", "-shared", "-o", str(program), *objects, "-Wl,-z,defs", "-lm"], check=True)
    library = ctypes.CDLL(str(program))
    sizes = [described(folder, native()).arena_bytes for folder in folders]
    inputs = [torch.randn_like(EXAMPLE) for _ in range(4)]
    results: list[list[Tensor]] = [[], [], [], []]

    def run(i: int) -> None:
        memory, out = torch.empty(sizes[i % 2] + 64, dtype=torch.uint8), torch.empty(1, 5)
        place = ctypes.c_void_p(memory.data_ptr() + -memory.data_ptr() % 64)
        function = (library.small_run_in, library.shared_run_in)[i % 2]
        for _ in range(100):
            assert function(place, at(inputs[i]), at(out)) == 0
            results[i].append(out.clone())

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for x, found in zip(inputs, results, strict=True):
        close(found[0], answer(x))
        assert len(found) == 100
        assert all(torch.equal(out, found[0]) for out in found)


def test_a_call_ends_the_threads_that_it_starts_and_does_without_those_it_does_not_get(tmp_path: Path) -> None:
    folder = exported(native(), *SHARED)
    (tmp_path / "counted.c").write_text(COUNTED)
    (tmp_path / "input.bin").write_bytes(EXAMPLE.numpy().tobytes())
    wrapped = [f"-Wl,--wrap={name}" for name in ("pthread_create", "pthread_join")]
    build = ["gcc", "-Wall", "-Wextra", "-Werror", "counted.c", str(folder / "shared.o"), "-I", str(folder)]
    subprocess.run([*build, *wrapped, "-o", "counted", "-lm", "-pthread"], cwd=tmp_path, check=True)
    found = []
    for given, counts in ((2, "4 4 4"), (1, "4 2 2"), (0, "2 0 0")):
        command = [tmp_path / "counted", tmp_path / "input.bin", str(given)]
        first, *numbers = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        assert first == counts
        found.append(numbers)
    close(torch.tensor([[float(number) for number in found[0]]]), answer())
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(("name", "threads"), [ALONE, SHARED])
def test_callers_on_two_arenas_do_not_race(name: str, threads: int, tmp_path: Path) -> None:
    """ThreadSanitizer sees what the program does around the calls, and the threads that calls start."""
    folder = exported(native(), name, threads)
    (tmp_path / "callers.c").write_text(CALLERS.format(name=name, upper=name.upper()))
    options = ["-std=c11", "-Wall", "-Wextra", "-Werror", "-g", "-fsanitize=thread", "-I", str(folder)]
    build = ["gcc", *options, "callers.c", "-o", "callers", "-L", str(folder), f"-l{name}", "-lm", "-pthread"]
    subprocess.run(build, cwd=tmp_path, check=True)
    done = subprocess.run([tmp_path / "callers"], capture_output=True, text=True, check=False)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("ThreadSanitizer does not know this kernel's memory")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("name", "threads"), [ALONE, SHARED])
def test_nothing_but_the_c_library_is_needed(name: str, threads: int) -> None:
    """No function is asked for that allocates, and only the network's own can be seen from outside."""
    folder = exported(native(), name, threads)
    for file in (f"lib{name}.a", f"{name}.o"):
        defined, asked = (_names(folder / file, which) for which in ("--defined-only", "--undefined-only"))
        functions = {f"{name}_{what}" for what in ("run", "run_in", "run_image", "run_image_in")}
        assert defined == {*functions, f"{name}_classes"}
        mathematics = {"memset", "memcpy", "memmove", "expf", "logf", "powf", "sqrtf", "floorf"}
        assert asked <= mathematics | (set(loops.SYSTEM) if threads > 1 else set())
        assert "halide" not in "".join(defined | asked)


def _names(file: Path, which: str) -> set[str]:
    listed = subprocess.run(["nm", "-g", which, file], capture_output=True, text=True, check=True).stdout
    return {line.split()[-1] for line in listed.splitlines() if len(line.split()) >= 2}


@pytest.mark.parametrize(("name", "threads"), [ALONE, SHARED])
def test_commands_of_the_readme_build_the_example(name: str, threads: int, tmp_path: Path) -> None:
    """From the library, from the one object, and by CMake: each prints the model's answer."""
    source = exported(native(), name, threads)
    text = (source / "README.md").read_text()
    commands = re.findall(r"^(?:gcc .*|cmake .*)$", re.sub("`", "\n", text), re.MULTILINE)
    assert [command.split()[0] for command in commands] == ["gcc", "gcc", "cmake"]
    assert f"| threads of a call | {threads} |" in text
    answers = []
    for number, command in enumerate(commands):
        folder = tmp_path / str(number)
        shutil.copytree(source, folder)
        if command.startswith("cmake"):
            device_run.needs_program("cmake")
        for part in command.split(" && "):
            subprocess.run(shlex.split(part), cwd=folder, check=True, capture_output=True)
        (folder / "input.bin").write_bytes(EXAMPLE.numpy().tobytes())
        [program] = [path for path in folder.rglob("*example") if path.is_file() and os.access(path, os.X_OK)]
        done = subprocess.run([program, folder / "input.bin"], capture_output=True, text=True, check=True)
        answers.append([float(line.split()[0]) for line in done.stdout.splitlines()])
    close(torch.tensor([answers[0]]), answer())
    assert answers[0] == answers[1] == answers[2]


def test_header_says_what_a_call_does() -> None:
    texts = {name: (exported(native(), name, threads) / f"{name}.h").read_text() for name, threads in (ALONE, SHARED)}
    assert "allocates nothing and starts no thread" in texts["small"]
    assert "starts 2 threads" in texts["shared"]
    for name, threads in (ALONE, SHARED):
        upper, folder = name.upper(), exported(native(), name, threads)
        facts = json.loads((folder / "manifest.json").read_text())
        constants = dict(re.findall(rf"{upper}_(\w+) = (-?\d+)", texts[name]))
        assert constants == {
            "INPUT_SIZE": "429",
            "OUTPUT_SIZE": "5",
            "ARENA_BYTES": str(facts["arena_bytes"]),
            "REFUSED": "-1",
            "CLASSES": "5",
            "CHANNELS": "3",
            "HEIGHT": "13",
            "WIDTH": "11",
        }


@pytest.mark.slow
def test_threads_on_arm(tmp_path: Path) -> None:
    needs("arm-64-linux")
    folder = exported("arm-64-linux", *SHARED)
    goal, library, program = targets.TARGETS["arm-64-linux"], described(folder, "arm-64-linux"), tmp_path / "example"
    device_run.check.build(library, goal, program)
    found = [device_run.check.answers(library, goal, program, [EXAMPLE])[0] for _ in range(5)]
    close(found[0], answer())
    assert all(torch.equal(out, found[0]) for out in found)
