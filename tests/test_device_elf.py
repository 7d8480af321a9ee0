"""ELF objects become one: it links as its parts do, and shows no other names than those that are asked for."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from device_run import needs, needs_program

from sepconv.device import elf, glue
from sepconv.device.targets import TARGETS

# Data that is reached through other data, room that takes no bytes, a name that two objects have, and a function that
# whoever asks first defines.
FIRST = """
@table = internal constant [3 x i32] [i32 10, i32 -20, i32 30], align 64
@place = internal constant ptr getelementptr (i8, ptr @table, i32 4)
@room = internal global [70000 x i8] zeroinitializer, align 64
declare i32 @other(i32)
declare float @expf(float)
define internal i32 @same(i32 %x) {
  %y = add i32 %x, 1
  ret i32 %y
}
define weak i32 @common() {
  ret i32 5
}
define i32 @net_run(i32 %i) {
  %at = getelementptr i32, ptr @table, i32 %i
  %value = load i32, ptr %at
  %there = load ptr, ptr @place
  %second = load i32, ptr %there
  %more = call i32 @other(i32 %value)
  %kept = getelementptr i32, ptr @room, i32 %i
  %before = load i32, ptr %kept
  store i32 %more, ptr %kept
  %a = add i32 %more, %second
  %b = add i32 %a, %before
  %c = call i32 @same(i32 %b)
  %five = call i32 @common()
  %d = add i32 %c, %five
  ret i32 %d
}
define float @net_power(float %x) {
  %half = fmul float %x, 0x3FE0000000000000
  %y = call float @expf(float %half)
  %z = call float @net_scaled(float %y)
  ret float %z
}
declare float @net_scaled(float)
"""
SECOND = """
@factor = internal constant i32 7, section ".rodata.both"
@net_names = constant [2 x ptr] [ptr @a, ptr @b]
@a = internal constant [2 x i8] c"a\\00"
@b = internal constant [3 x i8] c"bc\\00"
declare i32 @common()
define internal i32 @same(i32 %x) {
  %f = load i32, ptr @factor
  %y = mul i32 %x, %f
  ret i32 %y
}
define i32 @other(i32 %x) {
  %y = call i32 @same(i32 %x)
  ret i32 %y
}
define float @net_scaled(float %x) {
  %y = fmul float %x, 0x4008CCCCC0000000
  ret float %y
}
"""
UNREACHED = """
declare i32 @nowhere()
define i32 @unused() {
  %x = call i32 @nowhere()
  ret i32 %x
}
"""
NAMES = ["net_run", "net_power", "net_names"]
PROGRAM = """
#include <stdio.h>
extern int net_run(int);
extern float net_power(float);
extern const char *const net_names[2];
#ifdef OWN
int common(void), same(void), other(void);
int common(void) { return 1; }
int same(void) { return 2; }
int other(void) { return 3; }
#endif
int main(void) {
  printf("%d %d ", net_run(0), net_run(2));
  printf("%d %.6g %s%s", net_run(0), net_power(2), net_names[0], net_names[1]);
#ifdef OWN
  return common() + same() + other() - 6;
#endif
  return 0;
}
"""
PRINTED = "56 196 126 8.42667 abc"


def made(text: str, target: str = "x86-64-linux") -> bytes:
    goal = TARGETS[target]
    head = f'target datalayout = "{glue.machine_of(goal).target_data}"\ntarget triple = "{goal.triple}"\n'
    return glue.compiled(head + text, goal)


def joined(target: str = "x86-64-linux") -> bytes:
    return elf.link([made(text, target) for text in (FIRST, SECOND, UNREACHED)], NAMES)


@pytest.mark.parametrize("target", ["x86-64-linux", "arm-64-linux"])
@pytest.mark.parametrize("kind", [(), ("-static",), ("-no-pie",), ("-Wl,--gc-sections",)], ids=" ".join)
def test_a_program_of_it_alone(kind: tuple[str, ...], target: str, tmp_path: Path) -> None:
    """Its own names do not meet those of the program, and the linker has no complaint."""
    needs(target)
    goal = TARGETS[target]
    (tmp_path / "one.o").write_bytes(joined(target))
    (tmp_path / "main.c").write_text(PROGRAM)
    command = [goal.compiler, "-Wall", "-DOWN", "-Wl,--fatal-warnings", *kind, "main.c", "one.o", "-o", "main", "-lm"]
    subprocess.run(command, cwd=tmp_path, check=True)
    done = subprocess.run([*goal.runner, tmp_path / "main"], capture_output=True, text=True, check=True)
    assert done.stdout == PRINTED


def test_a_linker_makes_the_same_of_the_parts(tmp_path: Path) -> None:
    """What ``ld -r`` makes of them has as many bytes in each section that is reached, and gives the same program."""
    needs("x86-64-linux")
    needs_program("ld")
    for name, text in (("first", FIRST), ("second", SECOND)):
        (tmp_path / f"{name}.o").write_bytes(made(text))
    (tmp_path / "one.o").write_bytes(joined())
    (tmp_path / "main.c").write_text(PROGRAM)
    subprocess.run(["ld", "-r", "first.o", "second.o", "-o", "two.o"], cwd=tmp_path, check=True)
    ours, theirs = _sizes(tmp_path / "one.o"), _sizes(tmp_path / "two.o")
    assert set(theirs) - set(ours) <= {".eh_frame"}
    assert ours == {name: theirs[name] for name in ours}
    for name in ("one", "two"):
        subprocess.run(["gcc", "main.c", f"{name}.o", "-o", name, "-lm"], cwd=tmp_path, check=True)
        assert subprocess.run([tmp_path / name], capture_output=True, text=True, check=True).stdout == PRINTED


def _sizes(file: Path) -> dict[str, int]:
    """Bytes of each section that a program has in memory."""
    listed = subprocess.run(["readelf", "-SW", file], capture_output=True, text=True, check=True).stdout
    rows = [
        line.split("]", 1)[1].split() for line in listed.splitlines() if line.strip().startswith("[") and "]" in line
    ]
    return {row[0]: int(row[4], 16) for row in rows if len(row) > 6 and "A" in row[6] and int(row[4], 16)}


def test_only_what_is_asked_for_is_seen_and_only_what_is_reached_is_there(tmp_path: Path) -> None:
    needs_program("nm")
    (tmp_path / "one.o").write_bytes(joined())
    listed = subprocess.run(["nm", tmp_path / "one.o"], capture_output=True, text=True, check=True).stdout
    symbols = [line.split()[-2:] for line in listed.splitlines()]
    assert {name for kind, name in symbols if kind.isupper() and kind != "U"} == set(NAMES)
    assert {name for kind, name in symbols if kind == "U"} == {"expf"}
    assert {"other", "common"} <= {name for kind, name in symbols if kind.islower()}
    assert "unused" not in {name for _, name in symbols}
    assert len((tmp_path / "one.o").read_bytes()) < 6000
    needs_program("readelf")
    stack = subprocess.run(["readelf", "-SW", tmp_path / "one.o"], capture_output=True, text=True, check=True).stdout
    assert ".note.GNU-stack" in stack


def test_what_cannot_be_joined_is_said() -> None:
    with pytest.raises(ValueError, match="walk is not defined"):
        elf.link([made(FIRST), made(SECOND)], ["walk"])
    with pytest.raises(ValueError, match="no ELF object"):
        elf.link([b"\0asm" + bytes(60)], ["run"])
    with pytest.raises(ValueError, match="several machines"):
        elf.link([made(FIRST), made(SECOND, "arm-64-linux")], ["net_run"])
    with pytest.raises(ValueError, match="'there' lies in no section"):
        elf.link([made("@there = common global i32 0\ndefine ptr @f() {\n ret ptr @there\n}\n")], ["f"])
    group = "$f = comdat any\ndefine i32 @f() comdat {\n ret i32 1\n}\n"
    with pytest.raises(ValueError, match="a section of kind 17"):
        elf.link([made(group)], ["f"])
