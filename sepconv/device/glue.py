"""What calls a network's kernels in order, with its weights and its arena: in LLVM's language, and as object code.

Nothing of it is compiled by a C compiler, so that none is needed. It allocates nothing: Halide's buffers are on the
stack, and the memory that kernels ask for is the end of the arena (``scratch``), a part for each thread (``loops``).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

from sepconv.device import loops, scratch
from sepconv.device.record import (
    ARENA,
    INPUT,
    OUTPUT,
    PIXELS,
    WEIGHTS,
    BufferArgument,
    DeviceCall,
    Pointer,
    Recording,
)
from sepconv.device.targets import DeviceTarget

MISALIGNED = -1
"""What a call returns that was given no memory, or an arena that does not begin at a multiple of 64."""

# As halide_buffer_t: device, its interface, host, flags, type and number of dimensions, these, padding.
_BUFFERS = """
%buffer = type { i64, ptr, ptr, i64, i64, ptr, ptr }

define internal void @point(ptr %buffer, ptr %host, i64 %kind, ptr %dimensions) noinline nounwind {
  %host.at = getelementptr %buffer, ptr %buffer, i32 0, i32 2
  %kind.at = getelementptr %buffer, ptr %buffer, i32 0, i32 4
  %dimensions.at = getelementptr %buffer, ptr %buffer, i32 0, i32 5
  store %buffer zeroinitializer, ptr %buffer
  store ptr %host, ptr %host.at
  store i64 %kind, ptr %kind.at
  store ptr %dimensions, ptr %dimensions.at
  ret void
}
"""


class Entry(NamedTuple):
    """A function of the library: its name without the network's, its parameters, and the calls it makes.

    ``image``: where in the arena the input lies with which it calls ``run`` then, if it does.
    """

    name: str
    parameters: tuple[str, ...]
    calls: tuple[DeviceCall, ...]
    image: int | None = None


class ArenaSizes(NamedTuple):
    """Bytes of the arena, where its scratch memory begins, and how much of it each of the threads has."""

    arena: int
    scratch: int
    each: int
    threads: int


class Glue(NamedTuple):
    """All that goes into the object.

    Attributes:
        name: of the network; every symbol begins with it.
        symbols: of the kernels, by number.
        entries: each is there twice, with its own arena and (``_in``) with one that is given.
    """

    name: str
    symbols: tuple[str, ...]
    entries: tuple[Entry, ...]
    weights: bytes
    sizes: ArenaSizes
    classes: tuple[str, ...] = ()

    @property
    def functions(self) -> list[str]:
        """Their symbols."""
        return [f"{self.name}_{name}" for entry in self.entries for name in (entry.name, f"{entry.name}_in")]

    @property
    def exported(self) -> list[str]:
        """What the object defines for others, weak functions aside."""
        return self.functions + [f"{self.name}_classes"] * bool(self.classes)


def glue_of(name: str, symbols: tuple[str, ...], recording: Recording, classes: tuple[str, ...]) -> Glue:
    """``run``, and ``run_image`` where the network takes images of bytes: their input lies behind all else."""
    program = recording.program
    outputs = tuple(f"{OUTPUT}{i}" for i in range(len(program.outputs)))
    entries = [Entry("run", (*(f"{INPUT}{i}" for i in range(len(program.given))), *outputs), recording.calls)]
    if recording.normalise is not None:
        entries.append(Entry("run_image", (f"{PIXELS}0", *outputs), (recording.normalise,), recording.image))
    sizes = ArenaSizes(recording.arena, recording.scratch, recording.scratch_bytes, recording.threads)
    return Glue(name, symbols, tuple(entries), recording.weights, sizes, classes)


def assembly(glue: Glue, target: DeviceTarget) -> str:
    """The program in LLVM's language."""
    tables: dict[tuple[int, ...], int] = {}
    threads, each = glue.sizes.threads, glue.sizes.each
    functions = [_entry(glue, entry, tables) for entry in glue.entries]
    constants = [f"@d{number} = internal constant {_integers(values)}" for values, number in tables.items()]
    return "\n".join(
        [
            f'target datalayout = "{machine_of(target).target_data}"',
            f'target triple = "{target.triple}"',
            scratch.functions(target.pointer_bits),
            loops.team(threads, each, target) if threads > 1 else "",
            _BUFFERS,
            f"@weights = internal constant {_bytes(glue.weights)}, align 64",
            f"@arena = internal global [{max(glue.sizes.arena, 1)} x i8] zeroinitializer, align 64",
            *constants,
            *_classes(glue),
            *sorted({_declaration(glue, call) for entry in glue.entries for call in entry.calls}),
            *functions,
        ]
    )


def compiled(text: str, target: DeviceTarget) -> bytes:
    """Object code of a program in LLVM's language."""
    import llvmlite.binding as llvm

    module = llvm.parse_assembly(text)
    module.verify()
    found: bytes = machine_of(target).emit_object(module)
    return found


def machine_of(target: DeviceTarget) -> Any:
    """What LLVM makes code for the target with."""
    import llvmlite.binding as llvm

    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    return llvm.Target.from_triple(target.triple).create_target_machine(opt=2, reloc="pic", codemodel="small")


def _entry(glue: Glue, entry: Entry, tables: dict[tuple[int, ...], int]) -> str:
    """Three functions: in the static arena, in a given one, and the calls themselves."""
    name, given = f"@{glue.name}_{entry.name}", ", ".join(f"ptr %{parameter}" for parameter in entry.parameters)
    # What makes an image calls what starts threads.
    shared = glue.sizes.threads > 1 and entry.image is None
    team = "%team" if shared else "null"
    lines = [
        f"define i32 {name}({given}) nounwind {{",
        f"  %code = call i32 {name}_in(ptr @arena, {given})",
        "  ret i32 %code",
        "}",
        f"define i32 {name}_in(ptr %arena, {given}) nounwind {{",
        *["  %team = alloca %team"] * shared,
        *_checked(["arena", *entry.parameters]),
        f"  %free = getelementptr i8, ptr %arena, i64 {glue.sizes.scratch}",
        *["  call void @start(ptr %team, ptr %free)"] * shared,
        f"  %code = call i32 @calls_{entry.name}(ptr {team}, ptr %free, ptr %arena, {given})",
        *["  call void @stop(ptr %team)"] * shared,
        "  ret i32 %code",
        "refuse:",
        f"  ret i32 {MISALIGNED}",
        "}",
        f"define internal i32 @calls_{entry.name}(ptr %team, ptr %free, ptr %arena, {given}) nounwind {{",
        *_calls(glue, entry, tables),
        "}",
    ]
    return "\n".join(lines)


def _calls(glue: Glue, entry: Entry, tables: dict[tuple[int, ...], int]) -> list[str]:
    slots = max((sum(isinstance(a, BufferArgument) for a in call.arguments) for call in entry.calls), default=0)
    lines = [
        "  %scratch = alloca %scratch",
        *[f"  %b{slot} = alloca %buffer" for slot in range(slots)],
        "  %last.at = getelementptr %scratch, ptr %scratch, i32 0, i32 1",
        "  %team.at = getelementptr %scratch, ptr %scratch, i32 0, i32 2",
        "  store ptr %team, ptr %team.at",
    ]
    for number, call in enumerate(entry.calls):
        lines += _call(glue, call, number, (entry.parameters, tables))
    if entry.image is None:
        return [*lines, "  ret i32 0"]
    passed = ", ".join(f"ptr %{parameter}" for parameter in entry.parameters[1:])
    return [
        *lines,
        f"  %image = getelementptr i8, ptr %arena, i64 {entry.image}",
        f"  %rest = call i32 @{glue.name}_run_in(ptr %arena, ptr %image, {passed})",
        "  ret i32 %rest",
    ]


def _checked(parameters: Sequence[str]) -> list[str]:
    """All pointers lead somewhere, and the arena begins where it should."""
    lines = ["  %place = ptrtoint ptr %arena to i32", "  %low = and i32 %place, 63", "  %w0 = icmp ne i32 %low, 0"]
    for number, parameter in enumerate(parameters):
        lines += [
            f"  %n{number} = icmp eq ptr %{parameter}, null",
            f"  %w{number + 1} = or i1 %w{number}, %n{number}",
        ]
    return [*lines, f"  br i1 %w{len(parameters)}, label %refuse, label %run", "run:"]


def _call(
    glue: Glue, call: DeviceCall, number: int, known: tuple[Sequence[str], dict[tuple[int, ...], int]]
) -> list[str]:
    """One kernel; the next one where it returns 0."""
    parameters, tables = known
    lines, given, slot = ["  store ptr %free, ptr %scratch", "  store ptr null, ptr %last.at"], ["ptr %scratch"], 0
    for argument in call.arguments:
        if not isinstance(argument, BufferArgument):
            given.append(f"i32 {argument}" if isinstance(argument, int) else f"float {_float(argument)}")
            continue
        place, host = f"%p{number}.{slot}", _base(argument.where, parameters)
        table = tables.setdefault(argument.dimensions or (0, 1, 1, 0), len(tables))
        kind = argument.code | 1 << 16 | len(argument.dimensions) // 4 << 32
        lines.append(f"  {place} = getelementptr i8, ptr {host}, i64 {argument.where.offset}")
        lines.append(f"  call void @point(ptr %b{slot}, ptr {place}, i64 {kind}, ptr @d{table})")
        given.append(f"ptr %b{slot}")
        slot += 1
    symbol, after = glue.symbols[call.kernel], f"s{number + 1}"
    return [
        *lines,
        f"  %c{number} = call i32 @{symbol}({', '.join(given)})",
        f"  %f{number} = icmp ne i32 %c{number}, 0",
        f"  br i1 %f{number}, label %fail{number}, label %{after}",
        f"fail{number}:",
        f"  ret i32 %c{number}",
        f"{after}:",
    ]


def _base(where: Pointer, parameters: Sequence[str]) -> str:
    found = {ARENA: "%arena", WEIGHTS: "@weights"}.get(where.kind, f"%{where.kind}{where.number}")
    if where.kind not in (ARENA, WEIGHTS) and found.removeprefix("%") not in parameters:
        raise ValueError(f"no parameter {found}")
    return found


def _declaration(glue: Glue, call: DeviceCall) -> str:
    kinds = [
        "ptr" if isinstance(a, BufferArgument) else "i32" if isinstance(a, int) else "float" for a in call.arguments
    ]
    return f"declare i32 @{glue.symbols[call.kernel]}({', '.join(['ptr', *kinds])})"


def _float(value: float) -> str:
    """Exactly, as LLVM writes a float32: the bits of the same number in 64."""
    [single] = struct.unpack("f", struct.pack("f", value))
    return "0x" + struct.pack(">d", single).hex().upper()


def _integers(values: Sequence[int]) -> str:
    return f"[{len(values)} x i32] [{', '.join(f'i32 {value}' for value in values)}]"


def _bytes(content: bytes) -> str:
    """Each byte as two digits behind a backslash."""
    digits = content.hex("\\") if content else ""
    return f'[{len(content)} x i8] c"' + (f"\\{digits}" if digits else "") + '"'


def _classes(glue: Glue) -> list[str]:
    if not glue.classes:
        return []
    texts = [name.encode() + b"\0" for name in glue.classes]
    count = len(texts)
    lines = [f"@t{number} = internal constant {_bytes(text)}" for number, text in enumerate(texts)]
    listed = ", ".join(f"ptr @t{number}" for number in range(count))
    return [*lines, f"@{glue.name}_classes = constant [{count} x ptr] [{listed}]"]
