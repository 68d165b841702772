"""The whole configuration, section by section: each section is a frozen dataclass, named as in the TOML.

What both sides must agree on (`Shared`: method, training, model, seed) is sent by the coordinator in its welcome and
hashed; what only concerns one machine (data, device, threads, addresses, folders) stays with it.
"""

from pathlib import Path
from string import Formatter
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PlainValidator
from pydantic.dataclasses import dataclass

from fedtune.method import Method
from fedtune.methods import FLoRA

Id = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,62}[a-z0-9])?$")]


def _address(value: str) -> str:
    """Accepts `host:port`; an empty text, where a key allows it, means none."""
    host, _, port = value.rpartition(":")
    if value and not (host and port.isascii() and port.isdigit() and int(port) < 65536):
        raise ValueError("expected host:port with a port from 0 to 65535, such as 127.0.0.1:7070")
    return value


def _named(value: str) -> str:
    """Accepts an address that is not empty."""
    return _address(value or ":")


def _template(value: str) -> str:
    """Accepts a text in which `{prompt}` stands for the prompt, and no other name."""
    try:
        names = [name for _, name, _, _ in Formatter().parse(value) if name is not None]
    except ValueError as error:
        raise ValueError(f"expected a text with {{prompt}} in it; {error}") from error
    if set(names) != {"prompt"}:
        raise ValueError("expected a text with {prompt} in it, and no other {name}; write {{ and }} for braces")
    return value


Address = Annotated[str, AfterValidator(_named)]
Beta = Annotated[float, Field(ge=0, lt=1)]


def _method(value: object) -> Method:
    """Accepts a method that has been built; `fedtune.config.parse` builds it from `[method]`."""
    if not isinstance(value, Method):
        raise ValueError(f"expected a fedtune Method such as FLoRA(rank=8), got {value!r}")
    return value


@dataclass(frozen=True, kw_only=True, config={"extra": "forbid", "allow_inf_nan": False})
class RunConfig:
    """`[run]`: what the run is called, where its results go, and the seed of everything drawn at random.

    Attributes:
        name: what the run is called: small letters, digits and hyphens.
        folder: where its results and its log go; starting again in the same folder continues the run.
        seed: of everything that is drawn at random.
    """

    name: Id = "run"
    folder: Path = Path("runs/run")
    seed: int = Field(default=0, ge=0, lt=2**63)


@dataclass(frozen=True, kw_only=True, config={"extra": "forbid", "allow_inf_nan": False})
class ModelConfig:
    """`[model]`: the pretrained model.

    Attributes:
        name: a local folder (safetensors), a hub id, or a built-in model: `smollm2-135m`, or `tiny` for tests.
        revision: branch, tag or commit of a hub model.
        dtype: of the weights in memory: `float32` or `bfloat16`.
    """

    name: str = "smollm2-135m"
    revision: str = ""
    dtype: Literal["float32", "bfloat16"] = "float32"


@dataclass(frozen=True, kw_only=True, config={"extra": "forbid", "allow_inf_nan": False})
class DataConfig:
    """`[data]`: the rows to train on; which columns hold what.

    Attributes:
        name: a JSONL, CSV or Parquet file, a folder of such files, a hub data set, or a built-in data set.
        split: split of a hub data set.
        text: column of plain text: every token is learned.
        prompt, response: columns of a question and its answer: only the answer is learned.
        messages: column of chat messages (`role`, `content`): only the assistant's turns are learned.
        template: how a prompt is put when the tokenizer has no chat template; `{prompt}` stands for the column.
        label: column to skew by, or to report accuracy of.
        client_key: column that says whose row it is.
        held_out: fraction of rows kept for evaluation, when `held_out_name` names no file.
        held_out_name: file or data set to evaluate on.
        held_out_rows: at most so many rows are evaluated on.
        max_rows: at most so many rows, drawn by the seed; 0 means all.
        own_held_out: fraction of each client's own rows on which it measures, before and after its training, the model
            it works with: what all share, and what is personal to it. 0 measures nothing.
    """

    name: str = ""
    split: str = "train"
    text: str = ""
    prompt: str = ""
    response: str = ""
    messages: str = ""
    template: Annotated[str, AfterValidator(_template)] = "{prompt}\n"
    label: str = ""
    client_key: str = ""
    held_out: float = Field(default=0.1, ge=0, lt=1)
    held_out_name: str = ""
    held_out_rows: int = Field(default=200, ge=1)
    max_rows: int = Field(default=0, ge=0)
    own_held_out: float = Field(default=0.0, ge=0, lt=1)


@dataclass(frozen=True, kw_only=True, config={"extra": "forbid", "allow_inf_nan": False})
class TrainingConfig:
    """`[training]`: what every client does in one round.

    Attributes:
        steps: optimiser steps a round; 0 means by `epochs`.
        epochs: passes over the client's data a round, when `steps` is 0.
        batch_size: sequences a step.
        accumulate: parts a batch is cut into, to save memory.
        learning_rate, weight_decay, betas, clip_norm: of AdamW; `clip_norm` 0 means no clipping.
        lora_plus: LoRA+: an adapter's B takes this many times the learning rate, its A the learning rate itself.
        prox_mu: FedProx: adds mu/2 |w - w0|^2 to the loss, w0 being where the trained factors began this round; 0 is
            none.
        schedule: `constant`, or `cosine` down to zero within a round.
        warmup_steps: steps of linear warm-up at the start of a round.
        max_length: tokens a sequence; longer rows are cut.
        packing: several short rows in one sequence, kept apart by the attention mask.
        checkpointing: recompute activations in the backward pass, to save memory.
        autocast: bfloat16 arithmetic; `auto` where the hardware has it.
    """

    steps: int = Field(default=10, ge=0)
    epochs: int = Field(default=1, ge=1)
    batch_size: int = Field(default=8, ge=1)
    accumulate: int = Field(default=1, ge=1)
    learning_rate: float = Field(default=5e-4, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    clip_norm: float = Field(default=1.0, ge=0)
    lora_plus: float = Field(default=1.0, gt=0)
    prox_mu: float = Field(default=0.0, ge=0)
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = Field(default=0, ge=0)
    max_length: int = Field(default=256, ge=8)
    packing: bool = True
    checkpointing: bool = False
    autocast: Literal["auto", "on", "off"] = "auto"


@dataclass(frozen=True, kw_only=True, config={"extra": "forbid", "allow_inf_nan": False})
class RoundsConfig:
    """`[rounds]`: how many rounds, and whom a round waits for.

    Attributes:
        count: rounds in the run.
        clients: updates a round aims for; 0 means every client there is.
        min_clients: connected clients needed before a round starts.
        over_select: clients asked per update aimed for.
        quorum: fraction of `clients` without which a round is not closed.
        grace_s: seconds a round waits for the rest once the quorum is there.
        deadline_s: seconds after which a round closes if it has its quorum, and is tried again if not.
        attempts: tries a round gets before the run fails.
        plan_s: seconds of training that a round should take each client that has measured what it can
            (`client.measure`): it gets as many blocks, from the output, as fit, and a lower rank where not one does.
            0 plans nothing.
    """

    count: int = Field(default=3, ge=1)
    clients: int = Field(default=0, ge=0)
    min_clients: int = Field(default=1, ge=1)
    over_select: float = Field(default=1.0, ge=1, le=4)
    quorum: float = Field(default=1.0, gt=0, le=1)
    grace_s: float = Field(default=30.0, ge=0)
    deadline_s: float = Field(default=3600.0, gt=0)
    attempts: int = Field(default=3, ge=1)
    plan_s: float = Field(default=0.0, ge=0)


@dataclass(frozen=True, kw_only=True, config={"extra": "forbid", "allow_inf_nan": False})
class ServerConfig:
    """`[server]`: where the coordinator listens.

    Without `cert`, `key` and `client_ca` (PEM files) it serves only loopback addresses, unless `insecure` is true.

    Attributes:
        address: host and port to listen on; port 0 takes a free one and keeps it.
        cert, key: the coordinator's certificate chain and private key (PEM files).
        client_ca: the authority that signed the clients' certificates (PEM file).
        insecure: serve other machines without TLS: only on a network you trust.
        max_update_mb: largest update accepted, in MiB.
        metrics_address: host and port for Prometheus metrics; empty means none.
    """

    address: Address = "127.0.0.1:7070"
    cert: Path | None = None
    key: Path | None = None
    client_ca: Path | None = None
    insecure: bool = False
    max_update_mb: int = Field(default=4096, ge=1)
    metrics_address: Annotated[str, AfterValidator(_address)] = ""


@dataclass(frozen=True, kw_only=True, config={"extra": "forbid", "allow_inf_nan": False})
class ClientConfig:
    """`[client]`: this client: its id, its coordinator, its rank, its machine.

    Attributes:
        id: the client's name in the run, different for every client.
        address: host and port of the coordinator.
        rank: LoRA rank this client trains; 0 means the method's.
        alpha: LoRA alpha this client trains with; 0 means the method's.
        depth: transformer blocks, counted from the output, that carry this client's adapter; 0 means all.
        measure: train for a few steps before joining, and tell the coordinator what this machine can do
            (`rounds.plan_s`); a `rank` or `depth` set here stands all the same.
        folder: where this client keeps what it has not yet handed in.
        device: `cpu`, `cuda`, `cuda:1`, or `auto` for the first GPU there is.
        threads: arithmetic threads; 0 leaves it to torch.
        low_memory: tune a model's own weights without a copy of them, where the method can (`fedkseed`): slower, the
            same bits.
        ca: the authority that signed the coordinator's certificate (PEM file).
        cert, key: this client's certificate chain and private key (PEM files).
        insecure: connect to another machine without TLS: only on a network you trust.
    """

    id: Id = "client"
    address: Address = "127.0.0.1:7070"
    rank: int = Field(default=0, ge=0)
    alpha: float = Field(default=0.0, ge=0)
    depth: int = Field(default=0, ge=0)
    measure: bool = False
    folder: Path = Path("runs/client")
    device: str = "auto"
    threads: int = Field(default=0, ge=0)
    low_memory: bool = False
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    insecure: bool = False


@dataclass(frozen=True, kw_only=True, config={"extra": "forbid", "allow_inf_nan": False})
class SimulationConfig:
    """`[simulation]`: how many clients to start on this machine, and how the data is dealt out.

    Attributes:
        clients: client processes.
        ranks: rank per client; shorter lists are repeated; empty means the method's rank for all.
        alphas: LoRA alpha per client, likewise.
        depths: transformer blocks, counted from the output, that carry each client's adapter, likewise; 0 means all.
        partition: `iid`, `label` (Dirichlet over labels), `quantity` (Dirichlet over sizes), or `natural` (client_key).
        concentration: of the Dirichlet distribution; small means skewed.
        min_rows: rows every client gets at least.
        concurrency: clients that train at the same moment; 0 means one per core.
        threads: arithmetic threads per client.
    """

    clients: int = Field(default=4, ge=1)
    ranks: tuple[Annotated[int, Field(ge=1)], ...] = ()
    alphas: tuple[Annotated[float, Field(gt=0)], ...] = ()
    depths: tuple[Annotated[int, Field(ge=0)], ...] = ()
    partition: Literal["iid", "label", "quantity", "natural"] = "iid"
    concentration: float = Field(default=0.5, gt=0)
    min_rows: int = Field(default=2, ge=1)
    concurrency: int = Field(default=0, ge=0)
    threads: int = Field(default=1, ge=1)


@dataclass(frozen=True, kw_only=True, config={"extra": "forbid", "allow_inf_nan": False})
class Config:
    """Everything; `fedtune.config.load` reads it from a TOML file."""

    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    method: Annotated[Method, PlainValidator(_method)] = FLoRA()
    training: TrainingConfig = TrainingConfig()
    rounds: RoundsConfig = RoundsConfig()
    server: ServerConfig = ServerConfig()
    client: ClientConfig = ClientConfig()
    simulation: SimulationConfig = SimulationConfig()
