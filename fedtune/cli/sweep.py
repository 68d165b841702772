"""`fedtune compress --sweep`: held-out loss of an adapter at every density and alpha."""

from dataclasses import dataclass, replace
from pathlib import Path

from fedtune.cli.prepare import prepare
from fedtune.codecs.ternary import Ternary
from fedtune.compressed import balance_lora, difference, load_weights, read, write
from fedtune.errors import ModelError, problem
from fedtune.lora import load_peft
from fedtune.tensors import Array

DENSITIES = (0.05, 0.1, 0.2, 0.3, 0.5)
ALPHAS = (0.5, 1.0, 1.5, 2.0)


@dataclass(frozen=True, slots=True)
class Score:
    """One compression: its bytes, and the loss on held-out rows in nats a token."""

    codec: Ternary
    nbytes: int
    loss: float


def run_sweep(
    source: Path, codec: Ternary, balance: bool, config: Path, sets: tuple[str, ...]
) -> tuple[float, list[Score]]:
    """Measures a LoRA adapter as it is and compressed.

    Returns:
        The loss as it is, and a score for each density and alpha.

    Raises:
        FedtuneError: the adapter is not LoRA, or model or data are missing.
    """
    from fedtune.config import load
    from fedtune.training.evaluate import Evaluator

    if not (source / "adapter_config.json").exists():
        raise ModelError(problem(str(source), "a PEFT LoRA adapter, for --sweep", "something else"))
    loaded = load(config, sets)
    prepare(loaded)
    evaluator = Evaluator.open(loaded)
    plain = evaluator.factors(load_peft(source))["loss"]
    change = difference(source, load_weights(source), None)
    change = balance_lora(change) if balance else change
    scores = []
    for density in DENSITIES:
        for alpha in ALPHAS:
            one = replace(codec, density=density, alpha=alpha)
            data = write(change, one)
            scores.append(Score(one, len(data), evaluator.factors(_factors(source, data))["loss"]))
    return plain, scores


def _factors(source: Path, data: bytes) -> dict[str, Array]:
    """Reads compressed bytes as `load_peft` reads a folder."""
    from tempfile import TemporaryDirectory

    from fedtune.weights import save_weights

    with TemporaryDirectory() as folder:
        copy = Path(folder)
        (copy / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
        save_weights(copy / "adapter_model.safetensors", read(data))
        return load_peft(copy)
