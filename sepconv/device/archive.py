"""Objects in one library: the ``.a`` format, with the table of symbols that linkers want."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import NamedTuple

_MAGIC = b"!<arch>\n"
_HEADER = 60


class Member(NamedTuple):
    """An object, and the symbols that it defines for others."""

    name: str
    content: bytes
    symbols: Sequence[str]


def archive(members: Sequence[Member], bsd: bool = False) -> bytes:
    """The library. ``bsd``: as Apple's linker wants it."""
    return _bsd(members) if bsd else _gnu(members)


def _gnu(members: Sequence[Member]) -> bytes:
    names, starts = _long_names(members)
    table = _table(members)
    head = _MAGIC + _entry("/", table) + _entry("//", names)
    offsets, content = {}, b""
    for member in members:
        offsets[member.name] = len(head) + len(content)
        content += _entry(f"/{starts[member.name]}", member.content)
    return _MAGIC + _entry("/", _table(members, offsets)) + _entry("//", names) + content


def _table(members: Sequence[Member], offsets: Mapping[str, int] | None = None) -> bytes:
    """How many symbols, where each one's member begins, and their names."""
    listed = [(symbol, (offsets or {}).get(member.name, 0)) for member in members for symbol in member.symbols]
    places = [offset for _, offset in listed]
    return struct.pack(f">{len(listed) + 1}I", len(listed), *places) + b"".join(s.encode() + b"\0" for s, _ in listed)


def _long_names(members: Sequence[Member]) -> tuple[bytes, dict[str, int]]:
    names, starts = b"", {}
    for member in members:
        starts[member.name] = len(names)
        names += f"{member.name}/\n".encode()
    return names, starts


def _entry(name: str, content: bytes) -> bytes:
    """Without a date, so that the same network gives the same bytes."""
    header = f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode()
    return header + content + b"\n" * (len(content) % 2)


def _bsd(members: Sequence[Member]) -> bytes:
    def table(offsets: Mapping[str, int]) -> bytes:
        names, pairs = b"", b""
        for member in members:
            for symbol in member.symbols:
                pairs += struct.pack("<II", len(names), offsets.get(member.name, 0))
                names += f"_{symbol}".encode() + b"\0"
        names += b"\0" * (-len(names) % 8)
        return struct.pack("<I", len(pairs)) + pairs + struct.pack("<I", len(names)) + names

    start, offsets, content = len(_MAGIC) + len(_named("__.SYMDEF", table({}))), {}, b""
    for member in members:
        offsets[member.name] = start + len(content)
        content += _named(member.name, member.content)
    return _MAGIC + _named("__.SYMDEF", table(offsets)) + content


def _named(name: str, content: bytes) -> bytes:
    """The name lies before the content, which begins at a multiple of 8 from the start of the header."""
    whole = name.encode() + b"\0" * (-(len(name) + _HEADER) % 8)
    whole += b"\0" * 8 if len(whole) == len(name) else b""
    padding = b"\n" * (-len(content) % 8)
    return _entry(f"#1/{len(whole)}", whole + content + padding)
