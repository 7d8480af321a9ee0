"""What is in an object file of WebAssembly, as far as Halide and LLVM make it for a network: read, not yet linked.

The format is that of the WebAssembly tool conventions ("Linking"): symbols name functions and pieces of data, and
relocations say which places in code and data stand for which symbol.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

FUNCTION, DATA, GLOBAL = 0, 1, 2
"""Kinds of symbols."""
_UNDEFINED, _NAMED, _LOCAL = 0x10, 0x40, 0x02
_WITH_ADDEND = (3, 4, 5, 8, 9, 11)
_CUSTOM, _TYPES, _IMPORTS, _FUNCTIONS, _CODE, _DATA = 0, 1, 2, 3, 10, 11
_SEGMENTS, _SYMBOLS = 5, 8


class WasmSymbol(NamedTuple):
    """``place``: which function it is, or which segment its data are in; ``offset``: there."""

    kind: int
    name: str
    defined: bool
    local: bool
    place: int = 0
    offset: int = 0


class Relocation(NamedTuple):
    """The place, from the start of its function or segment, that stands for a symbol."""

    kind: int
    offset: int
    symbol: int
    addend: int


@dataclass
class WasmPiece:
    """The body of a function, or a segment of data with its alignment and name."""

    content: bytes
    start: int
    relocations: list[Relocation] = field(default_factory=list)
    alignment: int = 1
    name: str = ""


@dataclass
class WasmObject:
    """``imported``: type of each function that comes from elsewhere; those of this object follow in number."""

    types: list[bytes] = field(default_factory=list)
    imported: list[int] = field(default_factory=list)
    names: dict[int, list[str]] = field(default_factory=lambda: {FUNCTION: [], GLOBAL: []})
    functions: list[int] = field(default_factory=list)
    code: list[WasmPiece] = field(default_factory=list)
    data: list[WasmPiece] = field(default_factory=list)
    symbols: list[WasmSymbol] = field(default_factory=list)

    def type_of(self, index: int) -> bytes:
        return self.types[[*self.imported, *self.functions][index]]


class WasmReader:
    """Numbers and names from bytes, one after the other."""

    def __init__(self, content: bytes) -> None:
        self.content, self.at = content, 0

    def __bool__(self) -> bool:
        return self.at < len(self.content)

    def byte(self) -> int:
        self.at += 1
        return self.content[self.at - 1]

    def number(self, signed: bool = False) -> int:
        value = shift = 0
        while True:
            byte = self.byte()
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value - (1 << shift) if signed and byte & 0x40 else value

    def take(self, count: int) -> bytes:
        self.at += count
        return self.content[self.at - count : self.at]

    def text(self) -> str:
        return self.take(self.number()).decode()

    def parts(self) -> Iterator[tuple[int, WasmReader]]:
        """Sections, or parts of one: a kind, a length, the content."""
        while self:
            yield self.byte(), WasmReader(self.take(self.number()))


def read(content: bytes) -> WasmObject:
    """
    Raises:
        ValueError: there is something in it that no network needs.
    """
    found, whole = WasmObject(), WasmReader(content)
    kinds: list[int] = []
    if whole.take(8) != b"\0asm\1\0\0\0":
        raise ValueError("no WebAssembly object")
    for kind, part in whole.parts():
        kinds.append(kind)
        _section(found, kind, part, kinds)
    return found


def _section(found: WasmObject, kind: int, part: WasmReader, kinds: list[int]) -> None:
    if kind == _TYPES:
        found.types = [_type(part) for _ in range(part.number())]
    elif kind == _IMPORTS:
        for _ in range(part.number()):
            _import(found, part)
    elif kind == _FUNCTIONS:
        found.functions = [part.number() for _ in range(part.number())]
    elif kind == _CODE:
        found.code = [_body(part) for _ in range(part.number())]
    elif kind == _DATA:
        found.data = [_segment(part) for _ in range(part.number())]
    elif kind == _CUSTOM:
        name = part.text()
        if name == "linking":
            _linking(found, part)
        elif name.startswith("reloc."):
            pieces = {_CODE: found.code, _DATA: found.data}[kinds[part.number()]]
            for _ in range(part.number()):
                _relocation(pieces, part)


def _type(part: WasmReader) -> bytes:
    start = part.at
    part.byte()
    for _ in range(2):
        part.take(part.number())
    return part.content[start : part.at]


def _import(found: WasmObject, part: WasmReader) -> None:
    _, name, kind = part.text(), part.text(), part.byte()
    if kind == 0:
        found.imported.append(part.number())
        found.names[FUNCTION].append(name)
    elif kind == 1:
        part.byte()
        _limits(part)
    elif kind == 2:
        _limits(part)
    elif kind == 3:
        part.take(2)
        found.names[GLOBAL].append(name)
    else:
        raise ValueError(f"an import of kind {kind} in a WebAssembly object")


def _limits(part: WasmReader) -> None:
    for _ in range(2 if part.byte() & 1 else 1):
        part.number()


def _body(part: WasmReader) -> WasmPiece:
    length = part.number()
    return WasmPiece(part.take(length), part.at - length)


def _segment(part: WasmReader) -> WasmPiece:
    if part.number() != 0 or part.byte() != 0x41:
        raise ValueError("data of an unknown kind in a WebAssembly object")
    part.number(signed=True)
    part.byte()
    length = part.number()
    return WasmPiece(part.take(length), part.at - length)


def _linking(found: WasmObject, part: WasmReader) -> None:
    part.number()
    for kind, content in part.parts():
        if kind == _SEGMENTS:
            for piece in found.data[: content.number()]:
                piece.name, piece.alignment = content.text(), 1 << content.number()
                content.number()
        elif kind == _SYMBOLS:
            found.symbols = [_symbol(found, content) for _ in range(content.number())]


def _symbol(found: WasmObject, part: WasmReader) -> WasmSymbol:
    kind, flags = part.byte(), part.number()
    defined, local = not flags & _UNDEFINED, bool(flags & _LOCAL)
    if kind == DATA:
        name = part.text()
        index, offset = (part.number(), part.number()) if defined else (0, 0)
        if defined:
            part.number()
        return WasmSymbol(kind, name, defined, local, index, offset)
    index = part.number()
    if kind not in (FUNCTION, GLOBAL):
        return WasmSymbol(kind, part.text() if defined and kind != 3 else "", defined, local, index)
    named = defined or flags & _NAMED
    return WasmSymbol(kind, part.text() if named else found.names[kind][index], defined, local, index)


def _relocation(pieces: list[WasmPiece], part: WasmReader) -> None:
    kind, offset, symbol = part.byte(), part.number(), part.number()
    addend = part.number(signed=True) if kind in _WITH_ADDEND else 0
    piece = next(piece for piece in pieces if piece.start <= offset < piece.start + len(piece.content))
    piece.relocations.append(Relocation(kind, offset - piece.start, symbol, addend))
