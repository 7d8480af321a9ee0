"""The same network in other runtimes: what ``sepconv bench network`` measures against.

``source`` holds a network and the files made from it, ``pytorch`` and ``runtimes`` the contenders, ``pytorch_short``
and ``runtimes_int8`` those that compute in shorter numbers. None is imported before it is used, and one whose packages
are missing is reported as absent.
"""

from __future__ import annotations

from importlib.util import find_spec

from sepconv.bench.peers import pytorch, pytorch_short, runtimes, runtimes_int8
from sepconv.bench.peers.source import Contender as Contender
from sepconv.bench.peers.source import Network as Network

_ALL = (*pytorch.CONTENDERS, *pytorch_short.CONTENDERS, *runtimes.CONTENDERS, *runtimes_int8.CONTENDERS)
PRECISIONS = ("float32", "bfloat16", "int8")
BY_PRECISION = {kind: {one.name: one for one in _ALL if one.precision == kind} for kind in PRECISIONS}
CONTENDERS: dict[str, Contender] = BY_PRECISION["float32"]


def absent(contender: Contender) -> str:
    """Why a contender cannot run here, in a sentence; the empty string if it can."""
    missing = [package for package in contender.packages if find_spec(package) is None]
    return f"not installed: {', '.join(missing)}" if missing else ""
