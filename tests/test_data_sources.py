"""Where data sets are looked for, and how long."""

from __future__ import annotations

from typing import Any

import datasets
import pytest

from sepconv.data import load, sources


@pytest.mark.parametrize(
    ("known", "proxies", "offline"), [(False, {}, True), (True, {}, False), (False, {"https": "p"}, False)]
)
def test_without_a_network_nobody_waits_for_the_hub(
    monkeypatch: pytest.MonkeyPatch, known: bool, proxies: dict[str, str], offline: bool
) -> None:
    """A folder that was mistyped is an error at once."""
    from huggingface_hub import constants

    asked: list[bool] = []

    def look_up(*where: Any) -> list[Any]:
        if not known:
            raise OSError("Name or service not known")
        return []

    def load_dataset(name: str) -> None:
        asked.extend((datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE))
        raise ConnectionError("not here")

    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    monkeypatch.setattr(sources.socket, "getaddrinfo", look_up)
    monkeypatch.setattr(sources, "getproxies", lambda: proxies)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(FileNotFoundError, match="'phots' is no file or folder here"):
        load("phots")
    assert asked == [offline or value for value in before]
    assert before == (datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE)
