"""`fedtune export`: a result to take home: a PEFT adapter, or a whole model with the adapter merged in."""

import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from fedtune.cli.card import card, loadable
from fedtune.cli.console import err, out
from fedtune.errors import ConfigError, ModelError, StorageError, problem
from fedtune.installed import need_training

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")


def export(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="RUN_OR_ADAPTER", help="Run folder, PEFT or compressed adapter folder.", show_default=False
        ),
    ],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.", show_default=False)],
    round_: Annotated[int, typer.Option("--round", help="Which round's adapter; the last one if not given.")] = 0,
    merge: Annotated[bool, typer.Option("--merge", help="Write a full model that needs no PEFT.")] = False,
    own: Annotated[
        Path | None, typer.Option(metavar="CLIENT", help="A client's folder: put in what is personal to that client.")
    ] = None,
    base: Annotated[str, typer.Option(help="Base model to name or to merge into; the run's own if not given.")] = "",
    dtype: Annotated[str, typer.Option(help="Of the merged weights: float32 or bfloat16.")] = "float32",
) -> None:
    """Copy an adapter out of a run, or merge it into its base model.

    A FedKSeed run is rebuilt: a full model, or its adapter if it tuned one. A FedAvg run gives a full model.

    Examples:

    * `fedtune export runs/demo adapter`
    * `fedtune export runs/demo model --merge --dtype bfloat16`
    * `fedtune export runs/demo mine --own runs/demo/clients/client-00`
    """
    from fedtune.compressed import plain
    from fedtune.personal import MEMORY, own_adapter
    from fedtune.whole_folder import check_new

    found = find_adapter(source, round_)
    check_new(target)
    if dtype not in ("float32", "bfloat16"):
        raise ConfigError(problem("--dtype", "float32 or bfloat16", dtype))
    try:
        with TemporaryDirectory() as place, plain(found) as adapter:
            if own:
                whole, adapter = adapter, Path(place)
                own_adapter(whole, own / MEMORY, adapter)
            if is_seeds(adapter):
                _rebuild(adapter, target, base, dtype, merge)
            elif is_change(adapter):
                _shift(adapter, target, base, dtype)
            elif merge:
                _merge(adapter, target, base, dtype)
            else:
                _copy(adapter, target, base)
    except OSError as error:
        raise StorageError(problem(str(target), "a folder that can be written", error.strerror)) from error
    out.print(f"Wrote {target} from {source}", markup=False, soft_wrap=True)


def find_adapter(source: Path, number: int = 0) -> Path:
    """Returns the folder with the result that a run folder and a round (0: the last) mean; such a folder is itself.

    A result is a PEFT adapter, the coefficients of FedKSeed, or the change of the weights that FedAvg made.

    Raises:
        ModelError: there is none.
    """
    if _is_result(source) and not number:
        return source
    found = {int(path.name): path for path in source.glob("rounds/[0-9]*") if _is_result(path)}
    if number:
        if number not in found:
            closed = ", ".join(str(n) for n in sorted(found)) or "none"
            raise ModelError(problem(f"round {number} of {source}", f"a closed round (closed: {closed})", "none"))
        return found[number]
    if _is_result(source / "final"):
        return source / "final"
    if found:
        return found[max(found)]
    from fedtune.compressed import TERNARY

    want = "a run folder with a closed round, or a PEFT or compressed adapter folder"
    if (source / TERNARY).exists():
        raise ModelError(problem(str(source), want, "a compressed model", "Use fedtune decompress with --base"))
    raise ModelError(problem(str(source), want, "neither"))


def _is_result(folder: Path) -> bool:
    return (folder / _ADAPTER[0]).exists() or is_seeds(folder) or is_change(folder)


def is_seeds(folder: Path) -> bool:
    """Whether a folder holds the coefficients of a FedKSeed run."""
    from fedtune.methods.fedkseed import FILE

    return (folder / FILE).exists()


def check_seeds(result: Path, what: str, name: str, base: Path, remedy: str) -> None:
    """Checks that a FedKSeed run was made on a base; of an older version's result, which cannot tell, says so.

    Args:
        result: folder with the run's coefficients.
        what: it is called in an error.
        name: of the base.
        base: folder of the base.
        remedy: for a result of another base, how to name that one.

    Raises:
        ModelError: it was made on another.
    """
    from fedtune.base import open_base
    from fedtune.methods.fedkseed import made_on

    (named, digest), here = made_on(result), open_base(base).digest
    if not digest:
        said = f"note: {what} does not say which weights it was made on ({named}); taken to be those of {name}"
        err.print(said, markup=False, soft_wrap=True)
    elif digest != here:
        got = f"one of {named} ({digest[:12]})"
        raise ModelError(problem(what, f"a run on {name} ({here[:12]})", got, remedy))


def is_change(folder: Path) -> bool:
    """Whether a folder holds the change of the weights that a FedAvg run made."""
    from fedtune.methods.fedavg import FILE

    return (folder / FILE).exists()


def base_of(adapter: Path) -> str:
    """Returns what a PEFT adapter calls its base model; empty where it names none."""
    return str(json.loads((adapter / _ADAPTER[0]).read_text()).get("base_model_name_or_path") or "")


def _copy(adapter: Path, target: Path, base: str) -> None:
    from fedtune.weights import make_all_readable

    target.mkdir(parents=True, exist_ok=True)
    for name in _ADAPTER:
        shutil.copyfile(adapter / name, target / name)
    make_all_readable(target)
    _introduce(target, base or base_of(adapter))


def _introduce(target: Path, base: str) -> None:
    """Names the base of an exported adapter so that others than fedtune can load it, and adds a card."""
    path = target / _ADAPTER[0]
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"base_model_name_or_path": loadable(base)}, indent=2) + "\n")
    (target / "README.md").write_text(card(base))


def _merge(adapter: Path, target: Path, base: str, dtype: str) -> None:
    """Loads the base, adds B A to each adapted layer, and saves weights and tokenizer."""
    need_training()
    from fedtune.lora import load_peft
    from fedtune.training.merging import MergedBase
    from fedtune.training.models import choose_device, load_model, resolve_model

    factors = load_peft(adapter)
    name = base or base_of(adapter)
    if not name:
        raise ModelError(problem(str(adapter), "the name of its base model", "none", "Give it with --base"))
    model, tokenizer = load_model(resolve_model(name), dtype, choose_device("cpu"))
    MergedBase(model).merge(factors)
    _save(model, tokenizer, target)


def _save(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", target: Path) -> None:
    from fedtune.weights import make_all_readable

    model.save_pretrained(target)
    make_all_readable(target)
    tokenizer.save_pretrained(target)


def _shift(result: Path, target: Path, base: str, dtype: str) -> None:
    """Adds what a FedAvg run changed to the base's weights, and saves the model with its tokenizer."""
    need_training()
    from safetensors import safe_open

    from fedtune.methods.fedavg import FILE
    from fedtune.training.models import choose_device, load_model, resolve_model
    from fedtune.training.shifting import ShiftedBase, load_change

    change = load_change(result)
    with safe_open(result / FILE, framework="numpy") as file:
        name = base or str((file.metadata() or {}).get("base", ""))
    model, tokenizer = load_model(resolve_model(name), dtype, choose_device("cpu"))
    ShiftedBase(model).shift(change)
    _save(model, tokenizer, target)


def _rebuild(result: Path, target: Path, base: str, dtype: str, merge: bool) -> None:
    """Rebuilds what a FedKSeed run tuned and saves it: a PEFT adapter, or a model with its tokenizer."""
    need_training()
    from fedtune.lora import save_peft
    from fedtune.methods.fedkseed import made_on
    from fedtune.training.merging import MergedBase
    from fedtune.training.models import choose_device, load_model, resolve_model
    from fedtune.training.seeded import SeedAdapter
    from fedtune.training.zo import rebuilt

    name = base or made_on(result)[0]
    folder = resolve_model(name)
    check_seeds(result, str(result), name, folder, "Name that one with --base")
    model, tokenizer = load_model(folder, dtype, choose_device("cpu"))
    held = rebuilt(model, result)
    if isinstance(held, SeedAdapter) and not merge:
        save_peft(target, held.factors(), rank=held.spec.rank, alpha=held.spec.alpha, base_model=name)
        _introduce(target, name)
        return
    if isinstance(held, SeedAdapter):
        MergedBase(model).merge(held.scaled())
    _save(model, tokenizer, target)
