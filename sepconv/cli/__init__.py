"""The command line. Commands turn arguments into calls of the library and results into tables; they decide nothing."""

from sepconv.cli import inspect as inspect
from sepconv.cli import jobs as jobs
from sepconv.cli import quantize as quantize
from sepconv.cli import use as use
from sepconv.cli.app import main as main
from sepconv.cli.app import run as run
