"""Objects of WebAssembly are linked to one module: numbers, relocations, what is reached and what is not."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from device_run import needs_program

from sepconv.device import glue, wasm_link
from sepconv.device.targets import TARGETS
from sepconv.device.wasm_objects import WasmReader

WASM = TARGETS["wasm-32"]
HEAD = 'target triple = "wasm32-unknown-unknown"\n'
FIRST = """
@table = internal constant [3 x i32] [i32 10, i32 -20, i32 30], align 64
@place = internal constant ptr getelementptr (i8, ptr @table, i32 4)
@room = internal global [70000 x i8] zeroinitializer, align 64
declare i32 @other(i32)
declare float @expf(float)
define i32 @run(i32 %i) {
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
  ret i32 %b
}
define float @power(float %x) {
  %y = call float @expf(float %x)
  ret float %y
}
define i32 @unused() {
  %x = call i32 @nowhere()
  ret i32 %x
}
declare i32 @nowhere()
"""
SECOND = """
@before = internal constant i32 3, section ".rodata.both"
@factor = internal constant i32 7, section ".rodata.both"
define ptr @keeps() {
  ret ptr @before
}
define i32 @other(i32 %x) {
  %f = load i32, ptr @factor
  %y = mul i32 %x, %f
  ret i32 %y
}
"""


def made(text: str) -> bytes:
    return glue.compiled(f'target datalayout = "{glue.machine_of(WASM).target_data}"\n{HEAD}{text}', WASM)


def objects() -> list[bytes]:
    return [made(FIRST), made(SECOND)]


def test_functions_call_each_other_and_read_their_data(tmp_path: Path) -> None:
    needs_program("node")
    (tmp_path / "m.wasm").write_bytes(wasm_link.link(objects(), ["run", "power"], ["expf"]))
    script = (
        "const m = new WebAssembly.Module(require('fs').readFileSync(process.argv[1]));"
        "console.log(JSON.stringify(WebAssembly.Module.imports(m).map((i) => i.name)));"
        "const e = new WebAssembly.Instance(m, { env: { expf: Math.exp } }).exports;"
        "console.log(e.run(0), e.run(1), e.run(0), e.power(0), e.__heap_base.value, e.memory.buffer.byteLength);"
    )
    done = subprocess.run(["node", "-e", script, tmp_path / "m.wasm"], capture_output=True, text=True, check=True)
    imports, numbers = done.stdout.splitlines()
    assert imports == '["expf"]'  # not what only an unused function calls
    *values, base, size = map(int, numbers.split())
    assert values == [10 * 7 - 20, -20 * 7 - 20, 10 * 7 - 20 + 70, 1]
    assert wasm_link.STACK + 70000 < base <= size


def test_zeros_take_no_bytes() -> None:
    assert len(wasm_link.link(objects(), ["run", "power"], ["expf"])) < 1000


def test_what_is_missing_is_named() -> None:
    with pytest.raises(ValueError, match="walk is not defined"):
        wasm_link.link(objects(), ["walk"])
    with pytest.raises(ValueError, match="no WebAssembly object"):
        wasm_link.link([b"\x7fELF" + bytes(20)], ["run"])
    with pytest.raises(ValueError, match="nowhere is not defined"):
        wasm_link.link(objects(), ["unused"], ["expf"])
    outside = made("@there = external global i32\ndefine i32 @f() {\n %x = load i32, ptr @there\n ret i32 %x\n}\n")
    with pytest.raises(ValueError, match=r"there is not defined"):
        wasm_link.link([outside], ["f"])


@pytest.mark.parametrize("value", [0, 1, 63, 64, 127, 128, 8191, 70000, 2**31 - 1])
def test_numbers_are_read_as_they_were_written(value: int) -> None:
    for signed in (False, True):
        assert WasmReader(wasm_link._number(value, signed)).number(signed) == value
        assert WasmReader(wasm_link._padded(value)).number(signed) == value
    assert WasmReader(wasm_link._number(-value, True)).number(True) == -value
