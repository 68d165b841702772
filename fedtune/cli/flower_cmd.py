"""`fedtune flower`: a Flower app that runs fedtune, written and run."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedtune.cli.console import out
from fedtune.cli.options import Sets
from fedtune.errors import ConfigError, RoundError, problem

if TYPE_CHECKING:
    from fedtune.config import Config

app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", help="Run on Flower: a deployment, or Ray.")
_STARTED = re.compile(r"Successfully started run (\d+)")


@app.command("new")
def new(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="New folder for the app.", show_default=False)],
    config: Annotated[Path | None, typer.Option(metavar="CONFIG", help="Your TOML; the demo if not given.")] = None,
    sets: Sets = None,
) -> None:
    """Write a Flower app that runs a configuration: `flwr run DIR`.

    Examples:

    * `fedtune flower new my-app`
    * `fedtune flower new my-app --config config.toml`
    """
    from fedtune.config import load
    from fedtune.config.load import overridden
    from fedtune.config.template import demo
    from fedtune.flower.app import write_app

    overrides = tuple(sets or ())
    example = {section: dict(keys) for section, keys in demo().items()}
    found = load(config, overrides) if config else overridden(example, overrides, "the demo's configuration")
    write_app(folder, _placed(found))
    out.print(
        f"Wrote {folder}. Next: [bold]fedtune flower run {folder}[/], which is flwr run with an honest exit code",
        soft_wrap=True,
    )


@app.command("run")
def run(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The app's folder.", show_default=False)],
    connection: Annotated[
        str, typer.Argument(help="Connection in Flower's config.toml; local is a simulation.")
    ] = "local",
    run_config: Annotated[
        str, typer.Option("--run-config", metavar="KEYS", help="Settings for this run: 'rounds.count=5'.")
    ] = "",
    federation_config: Annotated[
        str, typer.Option("--federation-config", metavar="KEYS", help="Of a simulation: 'num-supernodes=4'.")
    ] = "",
) -> None:
    """Do what `flwr run DIR CONNECTION --stream` does, and exit with 7 when the run failed; `flwr run` exits with 0.

    Examples:

    * `fedtune flower run my-app`
    * `fedtune flower run my-app production --run-config 'rounds.count=5'`
    """
    if shutil.which("flwr") is None:
        raise ConfigError(problem("flwr", "Flower on the PATH", "none", "pip install 'fedtune[flower]'"))
    if not (folder / "pyproject.toml").is_file():
        raise ConfigError(problem(str(folder), "a Flower app", "none", f"`fedtune flower new {folder}` writes one"))
    command = ["flwr", "run", str(folder), connection, "--stream"]
    command += ["--run-config", run_config] if run_config else []
    command += ["--federation-config", federation_config] if federation_config else []
    number = next((found[1] for line in _lines(command) if (found := _STARTED.search(line))), "")
    status = _status(connection, number) if number else "not started"
    if status != "finished:completed":
        raise RoundError(problem("the run on Flower", "finished:completed", status, "The reason is in the log above"))


def _lines(command: list[str]) -> list[str]:
    """Runs a program to its end and shows what it says; returns the lines."""
    said: list[str] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as program:
        for line in program.stdout or ():
            out.print(line.rstrip("\n"), markup=False, soft_wrap=True)
            said.append(line)
    if program.returncode:
        raise ConfigError(problem(" ".join(command[:2]), "exit code 0", program.returncode, "See above"))
    return said


def _status(connection: str, number: str) -> str:
    listed = subprocess.run(
        ["flwr", "ls", connection, "--run-id", number, "--format", "json"], capture_output=True, text=True, check=False
    )
    try:
        return str(json.loads(listed.stdout)["runs"][0]["status"])
    except (ValueError, KeyError, IndexError):
        return "unknown"


def _placed(config: "Config") -> "Config":
    """Names files and folders of this machine by their whole path: Flower's programs run elsewhere."""

    def whole(name: str) -> str:
        path = Path(name).expanduser()
        return str(path.resolve()) if name and path.exists() else name

    return replace(
        config,
        run=replace(config.run, folder=config.run.folder.expanduser().resolve()),
        model=replace(config.model, name=whole(config.model.name)),
        data=replace(config.data, name=whole(config.data.name), held_out_name=whole(config.data.held_out_name)),
    )
