"""What somebody else's network said as it failed, in one line."""

from __future__ import annotations

_PLAIN = (RuntimeError, ValueError, TypeError)
"""Errors of these kinds say in words what is wrong; of others, such as KeyError, the kind says most."""


def complaint(error: BaseException) -> str:
    """The first line.

    Example:
        >>> complaint(ValueError("no such size\\nat all")), complaint(KeyError("depth")), complaint(AssertionError())
        ('no such size', "KeyError: 'depth'", 'AssertionError')
    """
    kind = "" if type(error) in _PLAIN else type(error).__name__
    said = next(iter(str(error).strip().splitlines()), "")
    return ": ".join(filter(None, (kind, said))) or type(error).__name__
