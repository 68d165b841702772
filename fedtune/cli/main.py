"""The `fedtune` command: errors become one plain message on stderr and an exit code, never a traceback.

Nothing heavy is imported here or at the top of a command's module: `fedtune --help` answers at once.
"""

import sys
from typing import Annotated, NoReturn

import typer

from fedtune import __version__
from fedtune.cli import (
    client,
    compress,
    doctor,
    evaluate,
    export,
    flower_cmd,
    init,
    merge,
    server,
    simulate,
    status,
    train,
)
from fedtune.cli.console import complain
from fedtune.errors import FedtuneError

INTERRUPTED = 130

_EPILOG = (
    "Exit codes: 0 done, 2 configuration, 3 data, 4 model, 5 bad bytes, 6 programs do not fit together, "
    "7 a round failed, 8 storage, 9 unreachable, 10 training diverged, 130 interrupted."
)

app = typer.Typer(
    name="fedtune",
    help="Fine-tune a language model together, on data that stays where it is.",
    epilog=_EPILOG,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command("init")(init.init)
app.command("doctor")(doctor.doctor)
app.command("simulate")(simulate.simulate)
app.command("server")(server.server)
app.command("client")(client.client)
app.command("train")(train.train)
app.command("evaluate")(evaluate.evaluate)
app.command("export")(export.export)
app.command("status")(status.status)
app.command("compress")(compress.compress)
app.command("decompress")(compress.decompress)
app.command("merge")(merge.merge)
app.add_typer(flower_cmd.app, name="flower")


def main() -> NoReturn:
    """Runs the command line and exits with its code."""
    try:
        code = app(standalone_mode=False)
        if code == INTERRUPTED:
            complain("interrupted")
    except FedtuneError as error:
        complain(str(error))
        code = error.exit_code
    except KeyboardInterrupt:
        complain("interrupted")
        code = INTERRUPTED
    except Exception as error:
        code = _usage(error)
    sys.exit(code or 0)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"fedtune {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Exists for its option, which acts by its callback."""


def _usage(error: Exception) -> int:
    """Prints a wrong command line as the parser words it; raises anything else again."""
    show, code = getattr(error, "show", None), getattr(error, "exit_code", None)
    if show is None or code is None:
        if type(error).__name__ == "Abort":
            complain("interrupted")
            return INTERRUPTED
        raise error
    show()
    return int(code)


if __name__ == "__main__":
    main()
