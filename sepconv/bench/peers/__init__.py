"""The same network in other runtimes: what ``sepconv bench network`` measures against.

``source`` holds a network and the files made from it, ``pytorch`` and ``runtimes`` the contenders. None is imported
before it is used, and one whose packages are missing is reported as absent.
"""

from __future__ import annotations

from importlib.util import find_spec

from sepconv.bench.peers import pytorch, runtimes
from sepconv.bench.peers.source import Contender as Contender
from sepconv.bench.peers.source import Network as Network

CONTENDERS: dict[str, Contender] = {one.name: one for one in (*pytorch.CONTENDERS, *runtimes.CONTENDERS)}


def absent(contender: Contender) -> str:
    """Why a contender cannot run here, in a sentence; the empty string if it can."""
    missing = [package for package in contender.packages if find_spec(package) is None]
    return f"not installed: {', '.join(missing)}" if missing else ""
