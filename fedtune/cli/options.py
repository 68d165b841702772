"""Arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated, TypeAlias

import typer

ConfigPath: TypeAlias = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="TOML file; `fedtune init` writes one.", show_default=False)
]
Sets: TypeAlias = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change one setting; may be given often."),
]
Json: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Plain: TypeAlias = Annotated[
    bool, typer.Option("--plain", help="Print plain lines without moving parts, for logs. Default when not a terminal.")
]
