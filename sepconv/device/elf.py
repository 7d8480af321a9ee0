"""ELF objects become one, so that no linker is needed: what the functions that are asked for reach, and nothing else.

Relocations stay what they are, at the places where their sections are now; whoever links the program follows them. Only
what is asked for can be seen from outside, so that networks in one program have no names in common.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_RELOCATION = struct.Struct("<QQq")
_MAGIC = b"\x7fELF\2\1"
_RELOCATABLE = 1
_BYTES, _SYMBOLS, _STRINGS, _RELOCATIONS, _EMPTY, _NO_ADDENDS, _GROUP = 1, 2, 3, 4, 8, 9, 17
_OF_A_SECTION = 0x40
_LOCAL, _GLOBAL = 0, 1
_SECTION_KIND = 3
_RESERVED = 0xFF00
_STACK = ".note.GNU-stack"
"""That this section is there says that the stack need not be executable."""


class ElfSection(NamedTuple):
    """``entry``: bytes of each of its constants, where equal ones may be joined."""

    name: str
    kind: int
    flags: int
    entry: int
    alignment: int
    size: int
    content: bytes


class ElfSymbol(NamedTuple):
    """``info``: whether it is local, and what it is; ``section``: 0 where it is defined elsewhere."""

    name: str
    info: int
    other: int
    section: int
    value: int
    size: int

    @property
    def is_local(self) -> bool:
        return self.info >> 4 == _LOCAL

    @property
    def is_section(self) -> bool:
        return self.info & 15 == _SECTION_KIND


class ElfRelocation(NamedTuple):
    offset: int
    kind: int
    symbol: int
    addend: int


@dataclass
class ElfObject:
    """``relocations``: by the number of the section that they are in; ``machine``: and what else all have in common."""

    machine: tuple[bytes, int, int]
    sections: list[ElfSection]
    symbols: list[ElfSymbol] = field(default_factory=list)
    relocations: dict[int, list[ElfRelocation]] = field(default_factory=dict)


def read(content: bytes) -> ElfObject:
    """
    Raises:
        ValueError: it is no object of 64 bits, or has something that no network needs.
    """
    if content[: len(_MAGIC)] != _MAGIC:
        raise ValueError("no ELF object of 64 bits")
    head = _HEADER.unpack_from(content)
    rows = [_SECTION.unpack_from(content, head[6] + i * _SECTION.size) for i in range(head[12])]
    names = _part(content, rows[head[13]])
    found = ElfObject((head[0], head[2], head[7]), [_section(content, row, names) for row in rows])
    for row in rows:
        if row[1] == _SYMBOLS:
            texts, fields = _part(content, rows[row[6]]), _SYMBOL.iter_unpack(_part(content, row))
            found.symbols = [ElfSymbol(_text(texts, name), *others) for name, *others in fields]
        elif row[1] == _RELOCATIONS:
            fields = _RELOCATION.iter_unpack(_part(content, row))
            found.relocations[row[7]] = [ElfRelocation(at, i & 0xFFFFFFFF, i >> 32, more) for at, i, more in fields]
        elif row[1] in (_NO_ADDENDS, _GROUP):
            raise ValueError(f"a section of kind {row[1]} in an ELF object")
    return found


def _part(content: bytes, row: Sequence[int]) -> bytes:
    return b"" if row[1] == _EMPTY else content[row[4] : row[4] + row[5]]


def _section(content: bytes, row: Sequence[int], names: bytes) -> ElfSection:
    return ElfSection(_text(names, row[0]), row[1], row[2], row[9], max(row[8], 1), row[5], _part(content, row))


def _text(strings: bytes, start: int) -> str:
    return strings[start : strings.index(b"\0", start)].decode()


class _Place(NamedTuple):
    """A section or a symbol, by number, of an object; of no object (-1) is what was made here."""

    owner: int
    number: int


class _Kind(NamedTuple):
    """Sections that have all of this in common become one."""

    name: str
    kind: int
    flags: int
    entry: int


@dataclass
class _Section:
    """What is written: sections one after the other, with relocations to symbols that have no number yet."""

    content: bytearray = field(default_factory=bytearray)
    size: int = 0
    alignment: int = 1
    relocations: list[tuple[int, int, _Place | str, int]] = field(default_factory=list)

    def add(self, section: ElfSection) -> int:
        """Where it begins there."""
        start = -(-self.size // section.alignment) * section.alignment
        if section.kind != _EMPTY:
            self.content += bytes(start - self.size) + section.content
        self.size, self.alignment = start + section.size, max(self.alignment, section.alignment)
        return start


class Joined:
    """What is reached, in the order in which it is."""

    def __init__(self, objects: Sequence[bytes], names: Sequence[str]) -> None:
        """
        Raises:
            ValueError: a name is not defined, or an object has something that no network needs.
        """
        self._objects = [read(content) for content in objects]
        self._machine = self._objects[0].machine
        if any(found.machine != self._machine for found in self._objects):
            raise ValueError("ELF objects for several machines")
        self._defined = {
            symbol.name: _Place(owner, number)
            for owner, found in reversed(list(enumerate(self._objects)))
            for number, symbol in enumerate(found.symbols)
            if symbol.section and not symbol.is_local
        }
        self._sections: dict[_Kind, _Section] = {}
        self._starts: dict[_Place, tuple[_Kind, int]] = {}
        self._local: dict[_Place, ElfSymbol] = {}
        self._outer: dict[str, ElfSymbol] = {}
        self._names = frozenset(names)
        for name in names:
            if name not in self._defined:
                raise ValueError(f"{name} is not defined")
            self._outer[name] = self._moved(self._defined[name], _GLOBAL)

    def _moved(self, place: _Place, bound: int) -> ElfSymbol:
        """A symbol where it is now."""
        symbol = self._objects[place.owner].symbols[place.number]
        if not 0 < symbol.section < _RESERVED:
            raise ValueError(f"the symbol {symbol.name!r} lies in no section of its ELF object")
        kind, start = self._reach(_Place(place.owner, symbol.section))
        number = 1 + list(self._sections).index(kind)
        return symbol._replace(info=bound << 4 | symbol.info & 15, section=number, value=symbol.value + start)

    def _reach(self, place: _Place) -> tuple[_Kind, int]:
        """The section in which a section of an object lies, and where; with all that it needs."""
        if place in self._starts:
            return self._starts[place]
        found = self._objects[place.owner]
        section = found.sections[place.number]
        name = ".text" if section.name.startswith(".text.") else section.name
        kind = _Kind(name, section.kind, section.flags, section.entry)
        whole = self._sections.setdefault(kind, _Section())
        start = whole.add(section)
        self._starts[place] = kind, start
        for relocation in found.relocations.get(place.number, []):
            symbol, more = self._symbol(_Place(place.owner, relocation.symbol))
            whole.relocations.append((start + relocation.offset, relocation.kind, symbol, relocation.addend + more))
        return kind, start

    def _symbol(self, place: _Place) -> tuple[_Place | str, int]:
        """What a relocation refers to, and what is to be added to its addend."""
        symbol = self._objects[place.owner].symbols[place.number]
        if symbol.is_section:
            kind, start = self._reach(_Place(place.owner, symbol.section))
            number = 1 + list(self._sections).index(kind)
            self._local[_Place(-1, number)] = ElfSymbol("", _SECTION_KIND, 0, number, 0, 0)
            return _Place(-1, number), start
        if not symbol.is_local:
            if symbol.name not in self._defined:
                self._outer[symbol.name] = symbol
            if symbol.name in self._names or symbol.name in self._outer:
                return symbol.name, 0
            place = self._defined[symbol.name]
        if place not in self._local:
            self._local[place] = self._moved(place, _LOCAL)
        return place, 0

    def whole(self) -> bytes:
        """The object."""
        texts = _Texts()
        symbols = [*self._local.values(), *self._outer.values()]
        numbers = {key: 1 + number for number, key in enumerate([*self._local, *self._outer])}
        table = _SYMBOL.pack(0, 0, 0, 0, 0, 0) + b"".join(
            _SYMBOL.pack(texts.place(symbol.name), *symbol[1:]) for symbol in symbols
        )
        file = _File(texts)
        for kind, section in self._sections.items():
            file.add(kind, section.content, section.alignment, size=section.size)
        file.add(_Kind(_STACK, _BYTES, 0, 0), b"")
        moved = [(kind.name, section.relocations) for kind, section in self._sections.items()]
        last = 2 + len(moved) + sum(bool(relocations) for _, relocations in moved)
        for number, (name, relocations) in enumerate(moved):
            rows = [_RELOCATION.pack(at, numbers[key] << 32 | kind, more) for at, kind, key, more in relocations]
            if rows:
                kind = _Kind(f".rela{name}", _RELOCATIONS, _OF_A_SECTION, _RELOCATION.size)
                file.add(kind, b"".join(rows), 8, (last, 1 + number))
        file.add(_Kind(".symtab", _SYMBOLS, 0, _SYMBOL.size), table, 8, (last + 1, 1 + len(self._local)))
        return file.whole(self._machine)


class _Texts:
    """Names, each once."""

    def __init__(self) -> None:
        self.content, self._places = b"\0", {"": 0}

    def place(self, name: str) -> int:
        if name not in self._places:
            self._places[name] = len(self.content)
            self.content += name.encode() + b"\0"
        return self._places[name]


class _File:
    """Sections behind one another, and the table of them at the end."""

    def __init__(self, texts: _Texts) -> None:
        self._texts, self._content = texts, bytearray(_HEADER.size)
        self._rows = [bytes(_SECTION.size)]

    def add(
        self,
        kind: _Kind,
        content: bytes | bytearray,
        alignment: int = 1,
        belongs: tuple[int, int] = (0, 0),
        size: int = 0,
    ) -> None:
        """``belongs``: the numbers of other things that are kept with it."""
        self._content += bytes(-len(self._content) % alignment)
        place, name = len(self._content), self._texts.place(kind.name)
        size = size or len(content)
        self._rows.append(_SECTION.pack(name, kind.kind, kind.flags, 0, place, size, *belongs, alignment, kind.entry))
        self._content += content

    def whole(self, machine: tuple[bytes, int, int]) -> bytes:
        self._texts.place(".strtab")
        self.add(_Kind(".strtab", _STRINGS, 0, 0), self._texts.content)
        if len(self._rows) >= _RESERVED:
            raise ValueError("an ELF object of too many sections")
        table = -(-len(self._content) // 8) * 8
        self._content += bytes(table - len(self._content)) + b"".join(self._rows)
        count = len(self._rows)
        start, code, flags = machine
        head = (start, _RELOCATABLE, code, 1, 0, 0, table, flags, _HEADER.size, 0, 0, _SECTION.size, count, count - 1)
        self._content[: _HEADER.size] = _HEADER.pack(*head)
        return bytes(self._content)


def link(objects: Sequence[bytes], names: Sequence[str]) -> bytes:
    """One object that offers these names; what it calls and has not, it asks for as its parts did.

    Raises:
        ValueError: a name is not defined, or an object has something that no network needs.
    """
    return Joined(objects, names).whole()
