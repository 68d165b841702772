"""`fedtune evaluate`: how well the base and adapters do on rows nobody trained on."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedtune.cli.console import err, figure, out
from fedtune.cli.options import ConfigPath, Json, Sets

if TYPE_CHECKING:
    from fedtune.config import Config


def evaluate(
    config: ConfigPath,
    adapter: Annotated[
        list[Path] | None, typer.Option(help="PEFT adapter folder or run folder to measure; may be given often.")
    ] = None,
    base: Annotated[bool, typer.Option("--base/--no-base", help="Measure the base model too.")] = True,
    set_: Sets = None,
    json: Json = False,
) -> None:
    """Measure held-out loss, perplexity and, for data with labels, accuracy.

    Examples:

    * `fedtune evaluate config.toml --adapter runs/demo`
    * `fedtune evaluate config.toml --no-base --adapter a --json`
    """
    from fedtune.cli.export import find_adapter
    from fedtune.cli.prepare import prepare
    from fedtune.config import load
    from fedtune.report.folder import storage

    loaded = load(config, tuple(set_ or ()))
    adapters = {str(path): find_adapter(path) for path in adapter or ()}
    with storage(loaded.run.folder):
        prepare(loaded)
        results = _measure(loaded, adapters, base)
    if json:
        out.print_json(data=results)
    else:
        _print(results)


def _measure(config: "Config", adapters: dict[str, Path], base: bool) -> dict[str, dict[str, float]]:
    from fedtune.training.evaluate import Evaluator

    results: dict[str, dict[str, float]] = {}
    with err.status("measuring"):
        evaluator = Evaluator.open(config)
        if base:
            results["base"] = evaluator.base()
        for name, folder in adapters.items():
            results[name] = evaluator.adapter(folder)
    return results


def _print(results: dict[str, dict[str, float]]) -> None:
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table("model", "loss", "perplexity", "accuracy", "macro F1", "rows", "tokens", box=SIMPLE)
    for name, r in results.items():
        table.add_row(
            name,
            figure(r["loss"]),
            figure(r["perplexity"], 2),
            figure(r.get("accuracy"), 3),
            figure(r.get("macro_f1"), 3),
            f"{r['rows']:.0f}",
            f"{r['tokens']:.0f}",
        )
    out.print(table)
