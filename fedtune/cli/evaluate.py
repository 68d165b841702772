"""`fedtune evaluate`: how well the base and adapters do on rows nobody trained on."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedtune.cli.console import err, figure, out
from fedtune.cli.options import ConfigPath, Json, Sets
from fedtune.errors import ModelError, problem

if TYPE_CHECKING:
    from fedtune.config import Config


def evaluate(
    config: ConfigPath,
    adapter: Annotated[
        list[Path] | None, typer.Option(help="Run folder, PEFT or compressed adapter folder; may be given often.")
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
        for path, folder in adapters.items():
            _check_fit(loaded, path, folder)
        results = _measure(loaded, adapters, base)
    if json:
        out.print_json(data=results)
    else:
        _print(results)


def _check_fit(config: "Config", path: str, adapter: Path) -> None:
    """Raises ModelError for a PEFT adapter or a FedKSeed run of another model, before one is loaded."""
    from fedtune.base import open_base
    from fedtune.cli.export import base_of, check_seeds, is_change, is_seeds
    from fedtune.compressed import plain
    from fedtune.locate import locate_model
    from fedtune.lora import key_a, key_b, layers_of, load_peft

    if is_seeds(adapter):
        folder = locate_model(config.model.name, config.model.revision)
        check_seeds(adapter, f"--adapter {path}", config.model.name, folder, "--set model.name=BASE")
    if is_seeds(adapter) or is_change(adapter):
        return
    with plain(adapter) as opened:
        factors = load_peft(opened)
    base = open_base(locate_model(config.model.name, config.model.revision))
    shapes = {spec.name.removesuffix(".weight"): spec for spec in base.weights.specs if "float" in spec.dtype}
    layers = layers_of(factors)
    sides = {layer: (factors[key_b(layer)].shape[0], factors[key_a(layer)].shape[1]) for layer in layers}
    odd = [n for n in layers if n in shapes and sorted(shapes[n].shape) != sorted(sides[n])]
    if layers and (odd or not any(n in shapes for n in layers)):  # a tied head is not among the weights
        layer = (odd or layers)[0]
        got = f"one of {base_of(adapter) or 'another'}: {layer} of {sides[layer][0]} x {sides[layer][1]}"
        raise ModelError(
            problem(f"--adapter {path}", f"an adapter of {config.model.name}", got, "--set model.name=BASE")
        )


def _measure(config: "Config", adapters: dict[str, Path], base: bool) -> dict[str, dict[str, float]]:
    from fedtune.compressed import plain
    from fedtune.training.evaluate import Evaluator

    results: dict[str, dict[str, float]] = {}
    with err.status("measuring"):
        evaluator = Evaluator.open(config)
        if base:
            results["base"] = evaluator.base()
        for name, folder in adapters.items():
            with plain(folder) as opened:
                results[name] = evaluator.adapter(opened)
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
