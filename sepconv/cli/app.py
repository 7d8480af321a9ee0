"""The command `sepconv` itself: version, help, and one line for a mistyped command line."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
import typer.core

import sepconv
from sepconv.cli import console
from sepconv.cli.guard import INTERRUPTED, WRONG_ARGUMENTS
from sepconv.system import interrupt


class _Command(typer.core.TyperCommand):
    """Refuses an option that is given twice, of which the first would be passed over in silence."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not ctx.resilient_parsing:
            given: list[Any] = self.make_parser(ctx).parse_args(list(args))[2]
            for option in given:
                single = option.param_type_name == "option" and not (option.multiple or option.is_flag)
                if single and given.count(option) > 1:
                    raise typer.BadParameter("it is given more than once", ctx, option)
        return super().parse_args(ctx, args)


class Commands(typer.Typer):
    """A Typer application of such commands."""

    def command(self, *names: Any, **settings: Any) -> Any:
        return super().command(*names, cls=_Command, **settings)


app = Commands(
    name="sepconv",
    help="Depthwise separable convolution: convert, train, count, measure and export.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(asked: bool) -> None:
    if asked:
        print(f"sepconv {sepconv.__version__}")
        raise typer.Exit


@app.callback()
def start(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Depthwise separable convolution: convert, train, count, measure and export."""


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    try:
        interrupt.over()
        console.set_up_terminal()
        return _run(list(sys.argv[1:] if arguments is None else arguments))
    except (KeyboardInterrupt, typer.Abort):
        # Commands say more than that themselves; this is before one has begun.
        console.error("interrupted")
        return INTERRUPTED


def _run(arguments: list[str]) -> int:
    command = typer.main.get_command(app)
    try:
        code = command.main(
            args=arguments, prog_name="sepconv", standalone_mode=False, obj=shlex.join(["sepconv", *arguments])
        )
    except Exception as error:
        # Wrong usage is a class of Click, which newer versions of Typer carry within them: known by what it can do.
        if not hasattr(error, "format_message"):
            raise
        # Without any arguments the help was shown already, and there is nothing to add.
        if message := error.format_message():
            console.error(f"{message} (try --help)")
        return int(getattr(error, "exit_code", WRONG_ARGUMENTS))
    return code if isinstance(code, int) else 0


def main() -> None:
    """Entry point of the command `sepconv`."""
    sys.exit(run())
