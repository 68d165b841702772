"""`fedtune doctor`: what is wrong with this machine or a configuration, and how to mend it."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedtune.cli.console import out
from fedtune.cli.options import Json, Sets

if TYPE_CHECKING:
    from fedtune.cli.check_machine import Check

_COLORS = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def doctor(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="TOML file to look at too.", show_default=False)
    ] = None,
    fetch: Annotated[bool, typer.Option("--fetch", help="Fetch the model and the data now.")] = False,
    set_: Sets = None,
    json: Json = False,
) -> None:
    """Look over this machine and a configuration; say what is wrong and how to mend it.

    Ends with exit code 1 when something must be mended first. Without CONFIG, `--fetch` gets the demo's model and data.

    Examples:

    * `fedtune doctor`
    * `fedtune doctor config.toml --fetch`
    """
    from fedtune.cli.check_machine import FAIL

    found = []
    for check in _checks(config, tuple(set_ or ()), fetch):
        found.append(check)
        if not json:
            _print(check)
    if json:
        out.print_json(data=[asdict(check) for check in found])
    if any(check.state == FAIL for check in found):
        raise typer.Exit(1)


def _checks(config: Path | None, overrides: tuple[str, ...], fetch: bool) -> Iterator["Check"]:
    from fedtune.cli.check_config import config_checks, fetch_demo
    from fedtune.cli.check_machine import machine_checks

    yield from machine_checks()
    if config is not None:
        yield from config_checks(config, overrides, fetch)
    elif fetch:
        yield from fetch_demo()


def _print(check: "Check") -> None:
    from rich.text import Text

    line = Text.assemble((f"{check.state:<5}", _COLORS[check.state]), f"{check.name:<17}", check.said)
    out.print(line, soft_wrap=True)
    if check.mend:
        out.print(Text(f"{'':<5}{'':<17}-> {check.mend}", style="dim"), soft_wrap=True)
