"""Shared by all tests: fixed seeds, one thread, and the tolerance that follows from the arithmetic."""

from __future__ import annotations

import gc
import hashlib
import importlib.util
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import shared

# The process that only hands out the tests need not wait for PyTorch.
if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sepconv.data import Data

    Run = tuple[Path, torch.nn.Module, torch.nn.Module, Tensor]

# What imports Triton as it is read is no test, and looked through for doctests where there is Triton.
collect_ignore = [] if importlib.util.find_spec("triton") else ["triton_code.py", "triton_checks.py"]

# One folder for the kernels and for the shared work of all test processes, which inherit the variables; nothing of the
# user's is touched.
_FOLDER = pytest.StashKey[tempfile.TemporaryDirectory[str]]()

# Files that take long though their tests are few.
_LONG = {"test_runs_workflow", "test_cli_commands", "test_cli_preparation", "test_report_layers", "test_report_live"}


def pytest_configure(config: pytest.Config) -> None:
    # A tenth of the time would go into looking through what PyTorch and its like keep for ever.
    gc.set_threshold(50_000, 20, 20)
    if not hasattr(config, "workerinput"):
        config.stash[_FOLDER] = tempfile.TemporaryDirectory(prefix="sepconv-tests-")
        os.environ["SEPCONV_CACHE_DIR"] = os.environ[shared.VARIABLE] = config.stash[_FOLDER].name
        if not any(map(os.path.exists, ("/dev/nvidia0", "/dev/kfd"))):
            # Without a GPU Triton's programs are interpreted. It wants to know before it is imported.
            os.environ.setdefault("TRITON_INTERPRET", "1")
        _keep_kernels(config, Path(config.stash[_FOLDER].name))


def _keep_kernels(config: pytest.Config, folder: Path) -> None:
    """Compiled kernels stay in pytest's cache for the next run: almost half of a first run is compiling.

    Their names hold the sources of the library that made them, but not those of the tests with kernels of their own.
    """
    if getattr(config, "cache", None) is None:
        return
    kernels = config.cache.mkdir("kernels")
    tests = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("test_kernels_*.py")))
    if config.cache.get("kernels/tests", "") != (made_by := hashlib.sha256(tests).hexdigest()):
        shutil.rmtree(kernels)
        kernels.mkdir()
        config.cache.set("kernels/tests", made_by)
    kernels.chmod(0o700)
    (folder / "kernels").symlink_to(kernels, target_is_directory=True)


def pytest_unconfigure(config: pytest.Config) -> None:
    if _FOLDER in config.stash:
        config.stash[_FOLDER].cleanup()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long come first: the last one of a run leaves the other cores idle."""
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path.stem not in _LONG, -tests[item.path]))


def pytest_sessionstart(session: pytest.Session) -> None:
    """Two test processes share two cores; tests of several threads, or of processes that compile, ask for more."""
    if hasattr(session.config, "workerinput") or not session.config.getoption("numprocesses", 0):
        import torch

        from sepconv.kernels.halide.jit import ahead

        torch.set_num_threads(1)
        ahead._cores = lambda: 1
        _measure_briefly()
        gc.freeze()


def _measure_briefly() -> None:
    """No test looks at how long anything took: what measures does so a few times, on little."""
    from sepconv.kernels.halide.schedule import peak
    from sepconv.runs import latency, precisions
    from sepconv.system import timing

    timing.SETTLE = 0.0
    latency.SAMPLES = precisions.ROUNDS = (3, 3)
    peak._SMALLEST = peak._LARGEST = 1 << 20
    peak._STEPS = 10_000


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="session")
def assert_rounding() -> Callable[..., None]:
    """``assert_rounding(y, truth, magnitude, terms)``: ``y`` differs from the float64 truth by rounding only.

    ``magnitude`` is the reference applied to absolute values. The classical bound of a sum of ``terms`` products is
    ``terms * eps * magnitude``; a missing or doubled tap is far outside it.
    """
    import torch

    def check(y: Tensor, truth: Tensor, magnitude: Tensor, terms: int = 8) -> None:
        assert y.shape == truth.shape
        limit = (terms + 2) * torch.finfo(y.dtype).eps * magnitude.double() + 1e-30
        excess = (y.double() - truth.double()).abs() / limit
        assert bool((excess <= 1).all()), f"error is {float(excess.max()):.3g} times the rounding bound"

    return check


@pytest.fixture(params=[1, 2], ids=["1thread", "2threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data() -> Data:
    """A few random images of five classes."""
    from distributed_run import random_data

    return random_data()


def _run_of(name: str, write: Callable[[Path], tuple[torch.nn.Module, torch.nn.Module, Tensor]]) -> Run:
    """What ``write`` leaves in the folder, with the page, and what it returns."""
    import torch

    from sepconv.report import write_report

    def make(folder: Path) -> None:
        torch.save(write(folder), folder / "returned.pt")
        write_report(folder)

    folder = shared.once(name, make)
    return folder, *torch.load(folder / "returned.pt", weights_only=False)


@pytest.fixture(scope="session")
def digits_run() -> Run:
    """The folder of a small run on the digits; the normal network, the separable one, and the image explained."""
    import sample_run

    return _run_of("digits", sample_run.write_digits_run)


@pytest.fixture(scope="session")
def mobilenet_run() -> Run:
    """The same for MobileNet v1 at full size, untrained."""
    import sample_run

    return _run_of("mobilenet", sample_run.write_mobilenet_run)


@pytest.fixture(scope="session")
def digits_page(digits_run: Run) -> Path:
    return digits_run[0] / "report.html"


@pytest.fixture(scope="session")
def mobilenet_page(mobilenet_run: Run) -> Path:
    return mobilenet_run[0] / "report.html"


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
