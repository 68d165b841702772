"""`fedtune merge`: several adapters of one base model, plain or compressed, become one."""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedtune.cli.console import out
from fedtune.errors import ConfigError, ModelError, problem

if TYPE_CHECKING:
    from fedtune.merging import Merge
    from fedtune.tensors import Array, Tensors


def merge(
    adapters: Annotated[
        list[Path],
        typer.Argument(
            metavar="ADAPTER_DIR...", help="PEFT or compressed adapter folders, or run folders.", show_default=False
        ),
    ],
    to: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.", show_default=False)],
    method: Annotated[
        str, typer.Option(help="`ties`, `task-arithmetic`, `dare`, `breadcrumbs`, `average` or `stack`.")
    ] = "ties",
    weights: Annotated[
        str, typer.Option(help="One number an adapter, with commas: `0.5,1,-1`; below 0 takes away.")
    ] = "",
    density: Annotated[float, typer.Option(help="Share that ties, dare and breadcrumbs keep.")] = 0.2,
    seed: Annotated[int, typer.Option(help="Of what dare drops.")] = 0,
) -> None:
    """Merge adapters with PEFT's own arithmetic, or with `stack` to the exact sum, whatever their ranks.

    Examples:

    * `fedtune merge a b c --out merged --method ties --density 0.2`
    * `fedtune merge a b --out merged --method average --weights 3,1`
    * `fedtune merge runs/flora other --out merged --method stack`
    """
    from fedtune.cli.prepare import need_training

    need_training()
    from fedtune import compressed
    from fedtune.cli.export import find_adapter
    from fedtune.merging import Merge
    from fedtune.merging import merge as merge_changes
    from fedtune.whole_folder import check_new

    how = Merge(method=method, weights=_numbers(weights), density=density, seed=seed)
    if len(adapters) < 2:
        raise ConfigError(problem("adapters", "two or more", len(adapters)))
    check_new(to)
    found = [find_adapter(folder) for folder in adapters]
    configs = [_config(folder) for folder in found]
    loaded = [_load(folder, how) for folder in found]
    if method == "stack":
        _stack(found, str(configs[0].get("base_model_name_or_path") or ""), to, how)
    else:
        _check_same(configs)
        changes = [compressed.difference(folder, own, None) for folder, own in zip(found, loaded, strict=True)]
        merged = merge_changes(changes, how)
        _check_finite(merged, f"{to}: weights too large")
        compressed.save_merged(found[0], to, merged)
    out.print(f"Wrote {to} from {len(adapters)} adapters ({method})", markup=False, soft_wrap=True)


def _load(folder: Path, how: "Merge") -> "dict[str, Array]":
    """Reads an adapter's weights; raises FedtuneError, naming folder and tensor, when they are not fit to be merged."""
    from fedtune.compressed import load_weights
    from fedtune.lora import check_ranks
    from fedtune.merging import check_changes

    weights = load_weights(folder)
    _check_finite(weights, str(folder))
    check_ranks(weights, str(folder))
    check_changes(weights, how)
    return weights


def _check_finite(weights: "Tensors", what: str) -> None:
    from fedtune.tensors import Manifest, check

    check(weights, Manifest.of(weights), what)


def _stack(folders: list[Path], base: str, to: Path, how: "Merge") -> None:
    from fedtune.compressed import plain
    from fedtune.lora import load_peft, save_product
    from fedtune.merging import stack
    from fedtune.whole_folder import whole_folder

    with ExitStack() as opened:
        factors = stack([load_peft(opened.enter_context(plain(folder))) for folder in folders], how)
    _check_finite(factors, f"{to}: weights too large")
    with whole_folder(to) as draft:
        save_product(draft, factors, base)


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise ConfigError(problem("--weights", "numbers with commas between them", repr(text))) from error


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
        return dict(config)
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(problem(str(folder), "a PEFT or compressed adapter folder", error)) from error


def _check_same(configs: list[dict[str, Any]]) -> None:
    """Raises ModelError unless all adapters scale alike: else A and B of one mean something else than of another."""
    for key in ("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"):
        values = [config.get(key) or None for config in configs]
        if any(value != values[0] for value in values):
            remedy = "--method stack adds LoRA adapters of any ranks and scales" if key != "peft_type" else ""
            raise ModelError(problem(f"adapter_config.json: {key}", f"{values[0]} in every adapter", values, remedy))
