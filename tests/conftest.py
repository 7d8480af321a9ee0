"""Shared by all tests: fixed seeds, one thread, and the tolerance that follows from the arithmetic."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

if TYPE_CHECKING:
    from sepconv.data import Data

# Two test processes share two cores; tests of several threads ask for them.
torch.set_num_threads(1)

# One folder for the kernels of all test processes, which inherit the variable; nothing of the user's is touched.
_KERNELS = pytest.StashKey[tempfile.TemporaryDirectory[str]]()


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.stash[_KERNELS] = tempfile.TemporaryDirectory(prefix="sepconv-kernels-")
        os.environ["SEPCONV_CACHE_DIR"] = config.stash[_KERNELS].name


def pytest_unconfigure(config: pytest.Config) -> None:
    if _KERNELS in config.stash:
        config.stash[_KERNELS].cleanup()


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def assert_rounding() -> Callable[..., None]:
    """``assert_rounding(y, truth, magnitude, terms)``: ``y`` differs from the float64 truth by rounding only.

    ``magnitude`` is the reference applied to absolute values. The classical bound of a sum of ``terms`` products is
    ``terms * eps * magnitude``; a missing or doubled tap is far outside it.
    """

    def check(y: Tensor, truth: Tensor, magnitude: Tensor, terms: int = 8) -> None:
        assert y.shape == truth.shape
        limit = (terms + 2) * torch.finfo(y.dtype).eps * magnitude.double() + 1e-30
        excess = (y.double() - truth.double()).abs() / limit
        assert bool((excess <= 1).all()), f"error is {float(excess.max()):.3g} times the rounding bound"

    return check


@pytest.fixture(params=[1, 2], ids=["1thread", "2threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data() -> Data:
    """A few random images of five classes."""
    from distributed_run import random_data

    return random_data()


Run = tuple[Path, torch.nn.Module, torch.nn.Module, Tensor]


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The folder of a small run on the digits; the normal network, the separable one, and the image explained."""
    import sample_run

    folder = tmp_path_factory.mktemp("digits")
    return folder, *sample_run.write_digits_run(folder)


@pytest.fixture(scope="session")
def mobilenet_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same for MobileNet v1 at full size, untrained."""
    import sample_run

    folder = tmp_path_factory.mktemp("mobilenet")
    return folder, *sample_run.write_mobilenet_run(folder)


@pytest.fixture(scope="session")
def digits_page(digits_run: Run) -> Path:
    from sepconv.report import write_report

    return write_report(digits_run[0])


@pytest.fixture(scope="session")
def mobilenet_page(mobilenet_run: Run) -> Path:
    from sepconv.report import write_report

    return write_report(mobilenet_run[0])


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium as the system has it; tests that need it are skipped where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed (make browser)")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Any, digits_page: Path) -> Iterator[Any]:
    """The page of the digits, which must have nothing to complain about in the end."""
    from visit import Visit

    visit = Visit(browser, digits_page)
    yield visit
    visit.page.close()
    assert visit.complaints == []
