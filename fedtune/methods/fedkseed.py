"""FedKSeed: full-parameter tuning in seeds and scalars (Qin et al., ICML 2024, arXiv 2312.06353).

Everyone holds the base w_0 and the same K random directions z_1, ..., z_K. A client steps along random ones of them,

    g = (L(w + eps z_s) - L(w - eps z_s)) / (2 eps)        w <- w - lr g z_s

and sends the pairs (s, g). The coordinator adds them up by seed, weighted by examples, over all rounds; from the sums
anyone rebuilds the model, in one walk over the weights:

    A_s <- A_s + sum_k p_k sum g        w = w_0 - lr sum_s A_s z_s

The coordinator keeps A in 2^-32, and sends -lr A as coefficients of 24 bits in a unit of their own, so a round costs
at most 16.5 KB each way at K = 4096, whatever the model's size: which layers an adapter is on, a client finds in
its own base. The directions and the rebuild are integers (`fedtune.directions`): every machine gets the same bits.
Each update says what model it was made on; a round sums those that agree (`fedtune.agreement`) and leaves out the
others. A rebuild starts at w_0, so what went wrong does not last.

FedKSeed-Pro (`pro`) draws seeds by how large their scalars have been on average.
"""

from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator
from pydantic.dataclasses import dataclass
from safetensors import SafetensorError, safe_open

from fedtune.agreement import Total, folded, judged
from fedtune.directions import Pool
from fedtune.errors import ConfigError, ModelError, ProtocolError, problem
from fedtune.kspace import (
    LIMIT,
    UNIT,
    Longs,
    Sum,
    accumulated,
    check_pairs,
    counted,
    levels,
    packed,
    probabilities,
    unpacked,
)
from fedtune.lora import LoraSpec, find_layers
from fedtune.method import BaseModel, ClientJob, Member, Method, Part, ZeroOrder
from fedtune.tensors import PRIVATE, Array, Manifest, Tensors, TensorSpec
from fedtune.weights import save_weights
from fedtune.zo import REFUSED

FILE = "fedkseed.safetensors"
_TOTAL, _SIZES, _COUNTS, _LAYERS = (PRIVATE + name for name in ("total", "sizes", "counts", "layers"))
_BASE = PRIVATE + "base"  # the base's digest, as text


@dataclass(frozen=True, kw_only=True, config={"extra": "forbid"})
class FedKSeed(Method):
    """FedKSeed and FedKSeed-Pro.

    Attributes:
        seeds: K, the number of directions.
        pool: `rademacher` (independent signs), `hadamard` (orthogonal signs, the fastest to rebuild; K a power of two
            from 128 to 4096; not the authors' pool) or `gaussian` (independent normal numbers, as in the paper).
        steps: local steps a round. They take the place of `training.steps` and `training.epochs`.
        directions: directions a step, whose scalars are averaged.
        optimizer: `sgd`, `sign` (the sign of g), or `conservative` (of standing still, going and going back, what
            gives the least loss; with one direction a step). Others are refused, each with its reason.
        learning_rate: constant; a schedule would not commute with summing scalars over rounds.
        eps: length of a perturbation.
        loss_clip: steps whose two losses differ by more are skipped; 0 skips none.
        pro: draw seeds by the mean size of their past scalars.
        draws: of seeds: `own`, each client draws its own; `shared`, all clients of a round draw the same ones, so that
            their K-vectors can be compared, but a round sees fewer directions; `auto`, shared with `krum_byzantine`.
        krum_byzantine: f, clients a round that may be hostile: multi-Krum leaves out the f whose K-vectors are farthest
            from the others', and each client counts for one whatever its weight. Rounds need 2 f + 3 updates.
        clip_norm: longest K-vector (a client's scalars summed by seed); longer ones are scaled down; 0 scales none.
        train: `all` weights; `sparse`: the smallest of each tensor of the base (Sparse MeZO); or `lora`: the factors of
            an adapter, A drawn from `run.seed`, B zero (of an embedding the other way round).
        density: of `sparse`: the fraction of each tensor that is tuned.
        rank: of `lora`.
        alpha: of `lora`; 0 means 2 r.
        target_modules: of `lora`: last parts of the names of adapted modules, or `all-linear`.
    """

    name: ClassVar[str] = "fedkseed"
    unused: ClassVar[tuple[str, ...]] = (
        *("steps", "epochs", "learning_rate", "schedule", "warmup_steps"),
        *("weight_decay", "betas", "clip_norm", "lora_plus", "prox_mu", "checkpointing"),
    )

    seeds: int = Field(default=4096, ge=1, le=65536)
    pool: Literal["rademacher", "hadamard", "gaussian"] = "hadamard"
    steps: int = Field(default=200, ge=1, le=2**13)
    directions: int = Field(default=1, ge=1, le=64)
    optimizer: Literal["sgd", "sign", "conservative"] = "sgd"
    learning_rate: float = Field(default=3e-7, ge=0, le=1e6)  # times the largest sums it stays far within float64
    eps: float = Field(default=5e-4, gt=0, allow_inf_nan=False)
    loss_clip: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    pro: bool = False
    draws: Literal["auto", "own", "shared"] = "auto"
    krum_byzantine: int = Field(default=0, ge=0, le=1000)
    clip_norm: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    train: Literal["all", "sparse", "lora"] = "all"
    density: float = Field(default=0.25, gt=0, le=1)
    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    target_modules: tuple[str, ...] = Field(default=("q_proj", "v_proj"), min_length=1)

    @field_validator("optimizer", mode="before")
    @classmethod
    def _keeps_seeds_and_scalars(cls, name: object) -> object:
        if name in REFUSED:
            raise ValueError(problem("optimizer", "sgd, sign or conservative", name, REFUSED[str(name)]))
        return name

    @model_validator(mode="after")
    def _one_direction_if_conservative(self) -> "FedKSeed":
        if self.optimizer == "conservative" and self.directions > 1:
            why = "Each direction is judged alone, and moves that lower the loss one by one may raise it together"
            raise ValueError(problem("directions", "1 with optimizer conservative", self.directions, why))
        return self

    @property
    def least_updates(self) -> int:
        """What robust folding needs to tell the few from the many."""
        return 2 * self.krum_byzantine + 3 if self.krum_byzantine else 1

    def init(self, base: BaseModel, seed: int) -> Tensors:
        """Starts at the base: no scalar yet."""
        Pool(self.pool, seed, self.seeds)  # raises ConfigError for a size that the pool does not have
        self._check_density(base)
        zeros = np.zeros(self.seeds, np.int64)
        layers = find_layers(base.weights, self.target_modules, base.transposed) if self.train == "lora" else ()
        names = "\n".join(layer.name for layer in layers)
        state = {
            "pool": np.array([seed], np.int64),
            "model": np.zeros(32, np.uint8),
            **self._public(zeros, zeros),
        }
        state[_LAYERS], state[_BASE] = (np.frombuffer(text.encode(), np.uint8) for text in (names, base.digest))
        return {**state, _TOTAL: zeros, **({_SIZES: zeros, _COUNTS: zeros} if self.pro else {})}

    def admit(self, member: Member) -> Member:
        """Takes everyone; a rank or alpha of a client's own only where it is the method's."""
        alpha = self.alpha or 2.0 * self.rank
        if self.train == "lora" and (member.rank not in (0, self.rank) or member.alpha not in (0.0, alpha)):
            got = f"rank {member.rank}, alpha {member.alpha}"
            remedy = "Leave client.rank and client.alpha, or simulation.ranks and simulation.alphas, out of the "
            remedy += "configuration: --set simulation.ranks=[]"
            raise ProtocolError(problem(f"adapter of {member.id}", f"rank {self.rank}, alpha {alpha}", got, remedy))
        return member

    def broadcast(self, state: Tensors, since: int) -> Tensors:
        """Sends what has changed: everything but what is the coordinator's own; the pool only once."""
        return {n: a for n, a in state.items() if not n.startswith(PRIVATE) and (since < 0 or n != "pool")}

    def fold(self, total: Total | None, update: Tensors, member: Member, weight: int) -> Total:
        """Adds the scalars by seed, in integers, to those of the same model.

        Multi-Krum compares clients, so with `krum_byzantine` each one's K-vector is kept to the end of the round. There
        each client counts for one: a weight is what it says of itself.
        """
        weight = 1 if self.krum_byzantine else weight
        mine = Sum.of(update, self.seeds, self.directions, member.id, weight, self.clip_norm)
        return folded(total, update["model"].tobytes(), member.id if self.krum_byzantine else "", mine)

    def finish(self, state: Tensors, total: Total, weight: int) -> Tensors:
        """Adds the mean of the updates that agree on the model and are trusted; without any the state stays."""
        verdict = judged(total, self.krum_byzantine)
        if not (used := verdict.used):
            return state
        scalars = accumulated(state[_TOTAL], used.mean())
        after = {name: state[name] for name in ("pool", _LAYERS, _BASE) if name in state}
        after |= {"model": np.frombuffer(verdict.model, np.uint8), _TOTAL: scalars}
        now = np.zeros(self.seeds, np.int64)
        if self.pro:
            after[_SIZES], after[_COUNTS] = counted(state[_SIZES], used.sizes), counted(state[_COUNTS], used.counts)
            now = levels(after[_SIZES], after[_COUNTS])
        return {**after, **self._public(scalars, now)}

    def notes(self, state: Tensors, total: Total) -> dict[str, list[str]]:
        """Names clients that were left out or clipped, and says where multi-Krum did less than it was asked for."""
        return judged(total, self.krum_byzantine).notes

    def install(self, job: ClientJob, received: Tensors) -> None:
        """Rebuilds the model from the base."""
        for name in ("pool", "levels"):
            if name in received:
                job.known[name] = received[name]
        coefficients, exponent = unpacked(received["coefficients"]), int(received["exponent"][0])
        digest = job.replay(self._own_part(job), self._pool(job.known), coefficients, exponent)
        job.known["model"] = np.frombuffer(digest, np.uint8)

    def client_update(self, job: ClientJob, expected: Manifest) -> Tensors:
        """Draws seeds and steps along their directions; a seed of -1 is a step that was skipped."""
        shared = self.draws == "shared" or (self.draws == "auto" and self.krum_byzantine > 0)
        rng = np.random.Generator(np.random.Philox(key=job.round_seed if shared else job.seed))
        chances = probabilities(job.known["levels"]) if self.pro else None
        seeds = rng.choice(self.seeds, self.steps * self.directions, p=chances).astype(np.int32)
        plan = ZeroOrder(self.steps, self.directions, self.eps, self.learning_rate, self.optimizer, self.loss_clip)
        g = job.zo_steps(self._own_part(job), self._pool(job.known), seeds, plan)
        taken = np.abs(g) < LIMIT  # false for NaN
        scalars = np.where(taken, g, 0).astype(np.float32)
        return {"seeds": np.where(taken, seeds, -1).astype(np.int32), "scalars": scalars, "model": job.known["model"]}

    def template(self, state: Tensors, member: Member) -> Manifest:
        """Expects one seed and one scalar a direction, and the digest of the model."""
        pairs = (self.steps * self.directions,)
        specs = TensorSpec("seeds", pairs, "int32"), TensorSpec("scalars", pairs, "float32")
        return Manifest((*specs, TensorSpec("model", (32,), "uint8")))

    def decode(self, payload: memoryview | bytes, state: Tensors, member: Member) -> Tensors:
        """Reads an update; raises WireError for seeds that are not in the pool and scalars beyond `LIMIT`."""
        update = super().decode(payload, state, member)
        check_pairs(update["seeds"], update["scalars"], self.seeds, member.id)
        return update

    def export(self, state: Tensors, folder: Path, base_model: str) -> None:
        """Writes the coefficients, which are the whole change; `fedtune.training.zo.rebuilt` applies them."""
        kept = {n: state[n] for n in ("pool", "coefficients", "exponent")}
        part = self._part(state[_LAYERS].tobytes().decode().split("\n"), state)
        about = {"base": base_model, "pool": self.pool, "seeds": str(self.seeds), **part.to_text()}
        if _BASE in state:  # not in a state that an older version began
            about["base_digest"] = state[_BASE].tobytes().decode()
        save_weights(folder / FILE, kept, about)

    def _check_density(self, base: BaseModel) -> None:
        """Raises ConfigError when no tensor of the base is so large that one of its weights would be tuned."""
        largest = max((prod(spec.shape) for spec in base.weights.specs if "float" in spec.dtype), default=0)
        if self.train == "sparse" and int(self.density * largest) == 0:
            want = f"at least 1 weight of the largest tensor, which has {largest}"
            raise ConfigError(problem("method.density", want, self.density, "Raise it, or use method.train = all"))

    def _pool(self, known: Tensors) -> Pool:
        return Pool(self.pool, int(known["pool"][0]), self.seeds)

    def _own_part(self, job: ClientJob) -> Part:
        return self._part(job.layers(self.target_modules) if self.train == "lora" else (), job.known)

    def _part(self, layers: Sequence[str], known: Tensors) -> Part:
        if self.train != "lora":
            return Part(self.train, self.density if self.train == "sparse" else 1.0)
        spec = LoraSpec(tuple(layers), self.rank, self.alpha or 2.0 * self.rank)
        return Part("lora", 1.0, spec, int(known["pool"][0]))

    def _public(self, scalars: Longs, now: Longs) -> dict[str, Array]:
        """What clients need: -lr A in 24 bits, in a unit of this round alone, and Pro's levels."""
        bits, exponent = packed(scalars.astype(np.float64) * (-self.learning_rate * UNIT))
        public: dict[str, Array] = {"coefficients": bits, "exponent": np.array([exponent], np.int32)}
        return {**public, "levels": now.astype(np.uint8)} if self.pro else public


def made_on(folder: Path) -> tuple[str, str]:
    """Returns the name and the digest of the base that an exported run was made on; empty where it does not say.

    Raises:
        ModelError: there is no such result.
    """
    try:
        with safe_open(folder / FILE, framework="numpy") as file:
            about = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise ModelError(problem(str(folder / FILE), "the coefficients of a FedKSeed run", error)) from error
    return about.get("base", ""), about.get("base_digest", "")
