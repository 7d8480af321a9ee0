"""Instructions that one call of a library executes, counted by qemu: what no machine's load changes.

The library is linked with a program that calls it as often as it is told; two runs that differ in the calls leave the
instructions of a call alone. qemu counts by a plugin of ours, since not every distribution has those of its own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from sepconv.device import ExportedLibrary
from sepconv.device.targets import TARGETS

CALLS = 2
_EMULATORS = {"x86-64": "qemu-x86_64", "arm-64": "qemu-aarch64"}
_PROGRAM = """
#include <stdlib.h>
#include "model.h"
static float input[MODEL_INPUT_SIZE], output[MODEL_OUTPUT_SIZE];
int main(int count, char **arguments) {
  int i, calls = count > 1 ? atoi(arguments[1]) : 1;
  for (i = 0; i < MODEL_INPUT_SIZE; i++) input[i] = (float)(i % 17) / 16;
  for (i = 0; i < calls; i++) if (model_run(input, output)) return 1;
  return 0;
}
"""
# The declarations are those of qemu-plugin.h, version 1 of its interface.
_PLUGIN = """
#include <inttypes.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
struct qemu_plugin_tb;
struct qemu_info_t;
extern size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
extern void qemu_plugin_register_vcpu_tb_trans_cb(uint64_t, void (*)(uint64_t, struct qemu_plugin_tb *));
extern void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb *, int, void *, uint64_t);
extern void qemu_plugin_register_atexit_cb(uint64_t, void (*)(uint64_t, void *), void *);
int qemu_plugin_version = 1;
static uint64_t executed;
static void translated(uint64_t id, struct qemu_plugin_tb *block) {
  (void)id;
  qemu_plugin_register_vcpu_tb_exec_inline(block, 0, &executed, qemu_plugin_tb_n_insns(block));
}
static void ended(uint64_t id, void *unused) {
  FILE *file = fopen(getenv("COUNT_FILE"), "w");
  (void)id;
  (void)unused;
  if (!file) return;
  fprintf(file, "%" PRIu64, executed);
  fclose(file);
}
int qemu_plugin_install(uint64_t id, const struct qemu_info_t *info, int count, char **arguments) {
  (void)info;
  (void)count;
  (void)arguments;
  qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
  qemu_plugin_register_atexit_cb(id, ended, NULL);
  return 0;
}
"""


def missing(target: str) -> str:
    """Why instructions for a target cannot be counted here; "" if they can."""
    goal, emulator = TARGETS[target], _emulator(target)
    tools = ["gcc", goal.compiler, emulator]
    absent = [tool for tool in tools if not tool or not shutil.which(tool)]
    return f"there is no {absent[0] or 'emulator'} here" if absent else ""


def _emulator(target: str) -> str:
    return next((emulator for family, emulator in _EMULATORS.items() if target.startswith(family)), "")


def counted(library: ExportedLibrary) -> int:
    """Instructions of one call.

    Raises:
        subprocess.CalledProcessError: the program cannot be built or run, or this qemu takes no such plugin.
    """
    folder, goal = library.folder, TARGETS[library.target]
    (folder / "count.c").write_text(_PROGRAM)
    counter(folder)
    program = folder / "count"
    source = [str(folder / "count.c"), "-static", "-o", str(program), "-L", str(folder)]
    subprocess.run([goal.compiler, "-O2", *source, f"-l{library.name}", "-lm"], check=True)
    once, more = (_run(library.target, folder, program, calls) for calls in (1, 1 + CALLS))
    return (more - once) // CALLS


def counter(folder: Path) -> Path:
    """The plugin for qemu, which writes what it has counted into the file ``COUNT_FILE``."""
    (folder / "plugin.c").write_text(_PLUGIN)
    subprocess.run(["gcc", "-shared", "-fPIC", "-O2", "-o", folder / "plugin.so", folder / "plugin.c"], check=True)
    return folder / "plugin.so"


def _run(target: str, folder: Path, program: Path, calls: int) -> int:
    file = folder / "count.txt"
    file.unlink(missing_ok=True)
    # Of x86 every instruction that qemu knows: its default processor has no AVX2.
    options = ["-cpu", "max", "-plugin", str(folder / "plugin.so")]
    command = [_emulator(target), *options, str(program), str(calls)]
    subprocess.run(command, check=True, env={**os.environ, "COUNT_FILE": str(file)}, capture_output=True)
    return int(file.read_text())
