"""Objects of WebAssembly become one module, so that no linker is needed: what the functions that are asked for reach.

Memory begins with the stack, which grows downwards and so cannot run into data; then come data, and what is free.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from sepconv.device.wasm_objects import DATA, FUNCTION, GLOBAL, Relocation, WasmObject, WasmPiece, WasmSymbol, read

STACK = 1 << 20
_PAGE = 1 << 16
_STACK_POINTER, _MEMORY_BASE = "__stack_pointer", "__memory_base"
_GLOBALS = (_STACK_POINTER, _MEMORY_BASE, "__heap_base")
_FUNCTION_LEB, _ADDRESS_LEB, _ADDRESS_SLEB, _ADDRESS_I32, _TYPE_LEB, _GLOBAL_LEB, _ADDRESS_REL_SLEB = (
    0,
    3,
    4,
    5,
    6,
    7,
    11,
)
_ADDRESSES = (_ADDRESS_LEB, _ADDRESS_SLEB, _ADDRESS_I32, _ADDRESS_REL_SLEB)


class _Place(NamedTuple):
    """A function or a segment, by number, of an object."""

    owner: int
    place: int


class Linked:
    """What is reached, in the order in which it is."""

    def __init__(self, objects: Sequence[bytes], names: Sequence[str], outside: Sequence[str]) -> None:
        """
        Raises:
            ValueError: a name is not defined, or an object has something that no network needs.
        """
        self._outer = outside
        self._objects = [read(content) for content in objects]
        self._defined = {
            (symbol.kind, symbol.name): (owner, symbol)
            for owner, found in reversed(list(enumerate(self._objects)))
            for symbol in found.symbols
            if symbol.defined and not symbol.local
        }
        self.names = names
        self._types: dict[bytes, int] = {}
        self._imports: dict[str, int] = {}
        self._functions: dict[_Place, None] = {}
        self._segments: dict[_Place, int] = {}
        self._end = STACK
        for name in names:
            if (FUNCTION, name) not in self._defined:
                raise ValueError(f"{name} is not defined")
            owner, symbol = self._defined[FUNCTION, name]
            self._reach(owner, symbol)

    def _reach(self, owner: int, symbol: WasmSymbol) -> None:
        """With all that it needs; depth does not matter, since kernels call no other ones."""
        found = self._found(owner, symbol)
        if found is None:
            return
        place, piece = found
        known = self._functions if symbol.kind == FUNCTION else self._segments
        if place in known:
            return
        if symbol.kind == FUNCTION:
            self._functions[place] = None
            self._type(self._objects[place.owner].type_of(place.place))
        else:
            start = -(-self._end // piece.alignment) * piece.alignment
            self._segments[place], self._end = start, start + len(piece.content)
        for relocation in piece.relocations:
            if relocation.kind == _TYPE_LEB:
                self._type(self._objects[place.owner].types[relocation.symbol])
            else:
                self._reach(place.owner, self._objects[place.owner].symbols[relocation.symbol])

    def _found(self, owner: int, symbol: WasmSymbol) -> tuple[_Place, WasmPiece] | None:
        """Where a symbol is defined; what is not is a function of the page, or one of three globals."""
        if not symbol.defined:
            known = self._defined.get((symbol.kind, symbol.name))
            if known is None:
                self._outside(owner, symbol)
                return None
            owner, symbol = known
        if symbol.kind == GLOBAL:
            raise ValueError(f"the global {symbol.name} is defined in an object")
        found = self._objects[owner]
        number = symbol.place - len(found.imported) if symbol.kind == FUNCTION else symbol.place
        return _Place(owner, symbol.place), (found.code if symbol.kind == FUNCTION else found.data)[number]

    def _outside(self, owner: int, symbol: WasmSymbol) -> None:
        if symbol.kind == FUNCTION and symbol.name in self._outer:
            self._imports.setdefault(symbol.name, self._type(self._objects[owner].type_of(symbol.place)))
        elif symbol.kind != GLOBAL or symbol.name not in _GLOBALS:
            raise ValueError(f"{symbol.name} is not defined")

    def _type(self, content: bytes) -> int:
        return self._types.setdefault(content, len(self._types))

    def module(self) -> bytes:
        """The whole; after this nothing else is reached."""
        code = [self._linked(place, *self._piece(FUNCTION, place)) for place in self._functions]
        data = [
            (start, self._linked(place, *self._piece(DATA, place)))
            for place, start in self._segments.items()
            if not self._objects[place.owner].data[place.place].name.startswith(".bss")
        ]
        exports = [_text(name) + b"\0" + _number(self._index(name)) for name in self.names]
        exports += [_text("memory") + b"\2\0", _text("__heap_base") + b"\3" + _number(_GLOBALS.index("__heap_base"))]
        values = zip(_GLOBALS, (STACK, 0, self._end), strict=True)
        types = [self._objects[place.owner].type_of(place.place) for place in self._functions]
        sections = {
            1: list(self._types),
            2: [_text("env") + _text(name) + b"\0" + _number(kind) for name, kind in self._imports.items()],
            3: [_number(self._types[kind]) for kind in types],
            5: [b"\0" + _number(-(-self._end // _PAGE))],
            6: [b"\x7f" + bytes([name == _STACK_POINTER]) + _constant(value) for name, value in values],
            7: exports,
            10: [_number(len(body)) + body for body in code],
            11: [b"\0" + _constant(start) + _number(len(part)) + part for start, part in data],
        }
        return b"\0asm\1\0\0\0" + b"".join(_section(kind, entries) for kind, entries in sections.items() if entries)

    def _piece(self, kind: int, place: _Place) -> tuple[WasmObject, WasmPiece]:
        found = self._objects[place.owner]
        return found, found.code[place.place - len(found.imported)] if kind == FUNCTION else found.data[place.place]

    def _linked(self, place: _Place, found: WasmObject, piece: WasmPiece) -> bytes:
        content = bytearray(piece.content)
        for relocation in piece.relocations:
            written = self._written(place.owner, found, relocation)
            content[relocation.offset : relocation.offset + len(written)] = written
        return bytes(content)

    def _written(self, owner: int, found: WasmObject, relocation: Relocation) -> bytes:
        if relocation.kind == _TYPE_LEB:
            return _padded(self._types[found.types[relocation.symbol]])
        symbol = found.symbols[relocation.symbol]
        if relocation.kind == _GLOBAL_LEB:
            return _padded(_GLOBALS.index(symbol.name))
        if relocation.kind == _FUNCTION_LEB:
            return _padded(self._number(owner, symbol))
        if relocation.kind not in _ADDRESSES:
            raise ValueError(f"a relocation of kind {relocation.kind} in a WebAssembly object")
        value = self._address(owner, symbol) + relocation.addend
        return struct.pack("<I", value) if relocation.kind == _ADDRESS_I32 else _padded(value)

    def _address(self, owner: int, symbol: WasmSymbol) -> int:
        if not symbol.defined:
            owner, symbol = self._defined[DATA, symbol.name]
        return self._segments[_Place(owner, symbol.place)] + symbol.offset

    def _number(self, owner: int, symbol: WasmSymbol) -> int:
        if not symbol.defined and (FUNCTION, symbol.name) not in self._defined:
            return list(self._imports).index(symbol.name)
        owner, symbol = (owner, symbol) if symbol.defined else self._defined[FUNCTION, symbol.name]
        return len(self._imports) + list(self._functions).index(_Place(owner, symbol.place))

    def _index(self, name: str) -> int:
        return self._number(*self._defined[FUNCTION, name])


def link(objects: Sequence[bytes], names: Sequence[str], outside: Sequence[str] = ()) -> bytes:
    """One module that offers the functions of these names, its memory, and where what is free of it begins.

    ``outside``: names of functions that whoever loads it offers.

    Raises:
        ValueError: a name is not defined, or an object has something that no network needs.
    """
    return Linked(objects, names, outside).module()


def _number(value: int, signed: bool = False) -> bytes:
    """As short as can be."""
    content = bytearray()
    while True:
        byte, value = value & 0x7F, value >> 7
        last = value == (-1 if signed and byte & 0x40 else 0)
        content.append(byte if last else byte | 0x80)
        if last:
            return bytes(content)


def _padded(value: int) -> bytes:
    """In five bytes, in which positive numbers of 32 bits with and without sign are the same."""
    return bytes((value >> 7 * i & 0x7F) | (0x80 if i < 4 else 0) for i in range(5))


def _text(name: str) -> bytes:
    return _number(len(name.encode())) + name.encode()


def _constant(value: int) -> bytes:
    """An expression: a number of 32 bits, and its end."""
    return b"\x41" + _number(value, signed=True) + b"\x0b"


def _section(kind: int, entries: Sequence[bytes]) -> bytes:
    content = _number(len(entries)) + b"".join(entries)
    return bytes([kind]) + _number(len(content)) + content
