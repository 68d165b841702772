"""`fedtune compress --sweep`: held-out loss of an adapter or a fine-tune at every density and alpha."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING

from fedtune.cli.prepare import prepare
from fedtune.codecs.ternary import Ternary
from fedtune.compressed import WEIGHTS, compressible, difference
from fedtune.compressed_file import read, write
from fedtune.errors import ModelError, problem
from fedtune.lora import load_peft
from fedtune.peft_weights import CONFIG, balance_lora, read_config
from fedtune.tensors import Manifest, Tensors, check

if TYPE_CHECKING:
    from fedtune.config import Config
    from fedtune.training.evaluate import Evaluator

DENSITIES = (0.05, 0.1, 0.2, 0.3, 0.5)
ALPHAS = (0.5, 1.0, 1.5, 2.0)
_COLUMNS = {"data.text", "data.prompt", "data.messages"}


@dataclass(frozen=True, slots=True)
class Score:
    """One compression: its bytes, and the loss on held-out rows in nats a token."""

    codec: Ternary
    nbytes: int
    loss: float


def run_sweep(
    source: Path, codec: Ternary, balance: bool, rows: Path, sets: tuple[str, ...], base: Path | None = None
) -> tuple[float, list[Score]]:
    """Measures a LoRA adapter, plain or compressed before, or a full fine-tune of `base`, as it is and compressed.

    Args:
        source: the adapter's or the model's folder.
        codec: scale and threshold.
        balance: bring LoRA factors into balance first.
        rows: a configuration; or a file of rows, all to be measured, for the model that `source` was trained from.
        sets: `section.key=value`, changes of the configuration.
        base: the model that was fine-tuned; None for an adapter.

    Returns:
        The loss as it is, and a score for each density and alpha.

    Raises:
        FedtuneError: nothing can be measured of `source`, or model or data are missing.
    """
    from fedtune.training.evaluate import Evaluator

    change = difference(source, compressible(source), base)
    if base is None and read_config(source)["peft_type"] != "LORA":
        why = "IA3, which evaluation has no code for"
        raise ModelError(problem(f"{source}: --sweep", "a LoRA adapter or a full fine-tune", why, "Choose --density"))
    check(change, Manifest.of(change), str(source))
    config = _config(source, rows, sets, base)
    prepare(config)
    loss = _measure(Evaluator.open(config), source, base)
    plain, scores = loss(change), []
    if balance and base is None:
        change = balance_lora(change)
    for one in (replace(codec, density=density, alpha=alpha) for density in DENSITIES for alpha in ALPHAS):
        data = write(change, one)
        scores.append(Score(one, len(data), loss(read(data, inf))))
    return plain, scores


def _config(source: Path, rows: Path, sets: tuple[str, ...], base: Path | None) -> "Config":
    """Reads a configuration, or makes one for a file of rows. A full fine-tune is measured on its base."""
    from fedtune.cli.init import READERS, guess_columns
    from fedtune.config import load
    from fedtune.config.load import overridden

    if rows.suffix.lower() not in READERS:
        return load(rows, (f"model.name={json.dumps(str(base))}", *sets) if base else sets)
    given = {text.partition("=")[0].strip() for text in sets}
    name = str(base) if base else str(read_config(source).get("base_model_name_or_path") or "")
    if not name and "model.name" not in given:
        raise ModelError(problem(str(source), "the name of its base model", "none", "Add --set model.name=BASE"))
    remedy = "Say which with --set data.text=COLUMN, or data.prompt and data.response"
    columns = {} if given & _COLUMNS else guess_columns(rows, remedy)
    data = {"name": str(rows), "held_out_name": str(rows), **columns}
    return overridden({"model": {"name": name}, "data": data}, sets, str(rows))


def _measure(evaluator: "Evaluator", source: Path, base: Path | None) -> Callable[[Tensors], float]:
    if base is not None:
        return lambda change: evaluator.change(change)["loss"]
    return lambda change: evaluator.factors(_factors(source, change))["loss"]


def _factors(source: Path, weights: Tensors) -> Tensors:
    """Takes weights as `load_peft` reads those of a folder with the configuration of `source`."""
    from tempfile import TemporaryDirectory

    from fedtune.weights import save_weights

    with TemporaryDirectory() as folder:
        copy = Path(folder)
        (copy / CONFIG).write_bytes((source / CONFIG).read_bytes())
        save_weights(copy / WEIGHTS, weights)
        return load_peft(copy)
