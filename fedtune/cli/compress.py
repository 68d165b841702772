"""`fedtune compress` and `decompress`: adapters and fine-tunes at a few tenths of a bit a value, and back."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedtune.cli.console import err, figure, out, size
from fedtune.cli.options import Sets
from fedtune.errors import ConfigError, problem

if TYPE_CHECKING:
    from fedtune.cli.sweep import Score
    from fedtune.codecs.ternary import Ternary
    from fedtune.compressed import Sizes

_Source = Annotated[
    Path,
    typer.Argument(
        metavar="ADAPTER_DIR",
        help="PEFT LoRA or IA3 folder, also a compressed one; run folder; or a model folder.",
        show_default=False,
    ),
]
_Small = Annotated[Path, typer.Argument(metavar="COMPRESSED_DIR", help="What compress wrote.", show_default=False)]
_Target = Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.", show_default=False)]
_Base = Annotated[Path | None, typer.Option(help="For a full fine-tune: folder of the model it started from.")]
_TERNARY_ONLY = ("density", "alpha", "scale", "per", "balance")


def compress(
    context: typer.Context,
    source: _Source,
    target: _Target,
    codec: Annotated[
        str, typer.Option(help="`ternary`; for a full fine-tune also `delta-come` or `ere`: singular vectors.")
    ] = "ternary",
    rank: Annotated[int, typer.Option(min=1, help="Singular vectors of each matrix, with those two.")] = 32,
    density: Annotated[float, typer.Option(help="Share of the values that is kept, 0 to 1.")] = 0.1,
    alpha: Annotated[float, typer.Option(help="The scale is multiplied with this.")] = 1.0,
    scale: Annotated[str, typer.Option(help="`least-squares`, or `std` as in the ComPEFT paper.")] = "least-squares",
    per: Annotated[str, typer.Option(help="Threshold and scale for the whole `vector` or each `tensor`.")] = "vector",
    balance: Annotated[bool, typer.Option(help="Spread LoRA's A and B evenly first; their product stays.")] = True,
    base: _Base = None,
    sweep: Annotated[
        Path | None,
        typer.Option(
            metavar="CONFIG_OR_ROWS",
            help="Score densities and alphas on its held-out rows, or on a JSONL, CSV or Parquet file; take the best.",
        ),
    ] = None,
    within: Annotated[float, typer.Option(help="Loss a sweep may give up for fewer bytes, in nats a token.")] = 0.01,
    set_: Sets = None,
) -> None:
    """Compress an adapter to signs and one scale (ComPEFT), or a full fine-tune to that or to singular vectors.

    Examples:

    * `fedtune compress adapter small --density 0.1`
    * `fedtune compress adapter small --sweep config.toml`
    * `fedtune compress adapter small --sweep rows.jsonl`
    * `fedtune compress my-model small --base base-model`
    * `fedtune compress my-model small --base base-model --codec delta-come --rank 32`
    """
    from fedtune import compressed
    from fedtune.cli.export import find_adapter
    from fedtune.codecs.spectral import delta_come, ere
    from fedtune.codecs.ternary import Ternary

    kinds = ("ternary", "delta-come", "ere")
    options = {"codec": (codec, kinds), "scale": (scale, ("least-squares", "std")), "per": (per, ("vector", "tensor"))}
    for name, (value, choices) in options.items():
        if value not in choices:
            raise ConfigError(problem(f"--{name}", " or ".join(choices), value))
    _check_used(context, codec, base, sweep)
    compressed.check_new(target)
    if base is None and not any(source.glob("model*.safetensors")):
        source = find_adapter(source)
    if codec != "ternary":
        if sweep is not None:
            raise ConfigError(problem("--sweep", "--codec ternary", codec))
        spectral = (ere if codec == "ere" else delta_come)(rank)
        _say(target, compressed.compress(source, target, spectral, base=base), f"{codec}, rank {rank} at most")
        return
    ternary = Ternary(density=density, alpha=alpha, scale=scale, top=per, sigma=per)  # type: ignore[arg-type]  # checked above
    if sweep is not None:
        from fedtune.cli.sweep import run_sweep

        with err.status("measuring"):
            plain, scores = run_sweep(source, ternary, balance, sweep, tuple(set_ or ()), base)
        ternary = _chosen(plain, scores, within)
    sizes = compressed.compress(source, target, ternary, base=base, balanced=balance)
    _say(target, sizes, f"density {ternary.density:g}, alpha {ternary.alpha:g}")


def decompress(
    source: _Small,
    target: _Target,
    base: _Base = None,
    max_gb: Annotated[
        float | None,
        typer.Option(
            help="Most gigabytes the weights may have. If not given: for an adapter 1, or 1000 times the file.", min=0
        ),
    ] = None,
) -> None:
    """Turn a compressed folder back into one that PEFT or transformers loads.

    Example: `fedtune decompress small adapter`
    """
    from fedtune import compressed

    compressed.decompress(source, target, base=base, most=None if max_gb is None else max_gb * compressed.GB)
    out.print(f"Wrote {target} from {source}", markup=False, soft_wrap=True)


def _check_used(context: typer.Context, codec: str, base: Path | None, sweep: Path | None) -> None:
    """Raises ConfigError for an option that was given and would change nothing."""

    def refuse(names: tuple[str, ...], want: str, got: str, remedy: str = "Leave out one of the two") -> None:
        for name in names:
            source = context.get_parameter_source(name)
            if source is not None and source.name == "COMMANDLINE":
                raise ConfigError(problem(f"--{name.strip('_')}", want, got, remedy))

    if codec == "ternary":
        refuse(("rank",), "--codec delta-come or ere", "--codec ternary")
    else:
        refuse(_TERNARY_ONLY, "--codec ternary", f"--codec {codec}")
    if base is not None:
        refuse(("balance",), "an adapter", f"--base {base}")
    if sweep is None:
        refuse(("within", "set_"), "--sweep beside it", "none", "Add --sweep, or leave this out")
    else:
        refuse(("density", "alpha"), "no --sweep, which tries many", f"--sweep {sweep}")


def _say(target: Path, sizes: "Sizes", how: str) -> None:
    ratio = sizes.before / sizes.after
    text = f"Wrote {target}: {size(sizes.after)} instead of {size(sizes.before)}, {ratio:.1f} times smaller ({how})"
    out.print(text, markup=False, soft_wrap=True)


def _chosen(plain: float, scores: "list[Score]", within: float) -> "Ternary":
    """Prints a sweep, and returns the smallest code that loses little; raises ConfigError when there is none."""
    _print(plain, scores)
    good = [score for score in scores if score.loss <= plain + within]
    if not good:
        best = min(scores, key=lambda score: score.loss)
        raise ConfigError(problem("--within", f"at least {best.loss - plain:.4f}, the best of the sweep", within))
    return min(good, key=lambda score: (score.nbytes, score.loss)).codec


def _print(plain: float, scores: "list[Score]") -> None:
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table("density", "alpha", "bytes", "loss", "loss more", box=SIMPLE)
    table.add_row("as it is", "", "", figure(plain), "")
    for one in scores:
        table.add_row(
            f"{one.codec.density:g}",
            f"{one.codec.alpha:g}",
            size(one.nbytes),
            figure(one.loss),
            f"{one.loss - plain:+.4f}",
        )
    out.print(table)
