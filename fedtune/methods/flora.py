"""FLoRA: federated LoRA by stacking (Wang et al., NeurIPS 2024, arXiv 2409.05976, section 4).

Client k trains A_k (r_k x I) and B_k (O x r_k), with scale s_k = alpha_k / r_k and p_k its share of the examples.
Stacking gives the exact mean of the products, whatever the ranks and scales:

    A_stack = [p_1 s_1 A_1 ; ... ; p_K s_K A_K]    B_stack = [B_1, ..., B_K]
    B_stack A_stack = sum_k p_k s_k B_k A_k

p_k and s_k both go into A, so clients may differ in alpha too; the paper puts only p_k there and needs one scale.

`start = "fresh"` is the paper's: each round begins with new factors. The state is base + one stack per closed round,
under names `000003/layer/A`: a client receives only the rounds it lacks and merges them into its base, in order. Past
`rank_budget` all stacks become one (`fedtune.lowrank`), and clients merge that into their base alone.

`start = "warm"` carries the training on. The state is one sum_i s_i u_i v_i' in order of falling s_i; client k merges
what is beyond r_k and trains on from its leading r_k components. What it sends takes their place, so that

    sum_i (1 - sum_{k: r_k > i} p_k) s_i u_i v_i' + sum_k p_k s_k B_k A_k

is the exact mean of the clients' models, and costs the coordinator a reweighting and a recompression.

A client of small depth has no factors in the first blocks (`fedtune.depth`). Where it has none it merges all that it
receives, and the sums are over the clients that have some, with p_k the share among them.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from fedtune import averaging, depth, downlink, history, stacking, trust
from fedtune.balance import balanced, lengthened
from fedtune.codecs.compression import Compression, Link
from fedtune.errors import ConfigError, ProtocolError, problem
from fedtune.lora import LoraSpec, key_a, key_b, layers_of, lora_scale, save_product
from fedtune.method import BaseModel, ClientJob, Member, Method
from fedtune.outer import FIRST, Outer, ServerOptimizer
from fedtune.tensors import PRIVATE, Array, Manifest, Tensors

_ERROR = PRIVATE + "error"


@dataclass(frozen=True, kw_only=True, config={"extra": "forbid", "allow_inf_nan": False})
class FLoRA(Method):
    """FLoRA with any mix of ranks and alphas.

    Attributes:
        rank: rank of clients that name none.
        alpha: LoRA alpha of clients that name none; 0 keeps each client's scale at 2 (alpha = 2 r).
        max_rank: the largest rank a client may bring (`rank` itself is always taken).
        target_modules: last parts of the names of adapted modules, or `all-linear`.
        dropout: LoRA dropout while training.
        rslora: scale by alpha / sqrt(r) instead of alpha / r.
        dtype: of the factors on the wire and of the stacks; what has been recompressed is float32.
        start: `fresh` begins each round with new factors, `warm` with the leading components of the global update.
        warm_length: how long A's rows are where a warm start begins: `balanced`, as long as B's columns, or `fresh`, as
            long as those of a fresh A, B taking the rest. `fresh` is for `training.lora_plus` above 1.
        rank_budget: the largest rank of the global update; past it, stacks are recompressed. 0 is no budget.
        energy: recompression keeps this share of the squared norm. At 1 it is exact, and a budget must not be below
            the layers' smaller sides; below 1 the budget is kept whatever that cuts off. Rounds report what was.
        server_optimizer: `none`, `momentum` or `nesterov`, or a table of the keys below.
        krum_byzantine: f, clients a round that may be hostile: multi-Krum leaves out the f whose products B A are
            farthest from the others'. Rounds need 2 f + 3 updates.
        clip_norm: longest change B A of a client, all layers together; longer ones are scaled down; 0 scales none.
        uplink: how updates travel: the name of a codec, or a table of the keys below, without feedback. Factors that
            go by `ternary` are balanced first: the same B A, evenly spread (`fedtune.balance`).
        downlink: how each round's stack travels, likewise. The coordinator's own stack becomes what it sends. Only
            with fresh starts and no budget: what is recompressed would be rounded anew in every round.
    """

    name: ClassVar[str] = "flora"
    takes_depth: ClassVar[bool] = True

    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    max_rank: int = Field(default=256, ge=1)
    target_modules: tuple[str, ...] = Field(default=("q_proj", "v_proj"), min_length=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    rslora: bool = False
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    start: Literal["fresh", "warm"] = "fresh"
    warm_length: Literal["balanced", "fresh"] = "balanced"
    rank_budget: int = Field(default=0, ge=0)
    energy: float = Field(default=1.0, gt=0, le=1)
    server_optimizer: Outer = ServerOptimizer()
    krum_byzantine: int = Field(default=0, ge=0, le=1000)
    clip_norm: float = Field(default=0.0, ge=0)
    uplink: Link = Compression()
    downlink: Link = Compression()

    @model_validator(mode="after")
    def _check(self) -> "FLoRA":
        if self.uplink.feedback:
            raise ValueError("uplink.feedback needs factors that go on from round to round: fedavg-lora has them")
        if self.downlink.feedback:
            raise ValueError("downlink.feedback needs factors that go on from round to round: fedavg-lora has them")
        if not self.downlink.exact and (self.start == "warm" or self.rank_budget):
            what = "start = 'warm'" if self.start == "warm" else "rank_budget"
            raise ValueError(f"downlink: {what} sends all rounds anew after each, and would round them anew each time")
        if self.warm_length == "fresh" and self.start == "fresh":
            raise ValueError("warm_length: 'fresh' says how a warm start begins, so it needs start = 'warm'")
        outer = self.server_optimizer
        if not outer.is_linear:
            why = "needs the square of every entry of B A, which a stack does not have: use momentum or nesterov"
            raise ValueError(f"server_optimizer: {outer.name} {why}")
        if not self.rank_budget and self.start == "fresh" and (outer.name != "none" or self.energy < 1):
            what = "energy below 1" if self.energy < 1 else f"server_optimizer: {outer.name}"
            raise ValueError(f"{what} needs rank_budget, or start = 'warm': without, stacks are never recompressed")
        return self

    @property
    def least_updates(self) -> int:
        """What robust folding needs to tell the few from the many."""
        return 2 * self.krum_byzantine + 3 if self.krum_byzantine else 1

    def init(self, base: BaseModel, seed: int) -> Tensors:
        """Starts from stacks of rank 0: they hold no numbers, only the layers' shapes.

        Raises:
            ConfigError: the budget might be too small, and nothing may be cut off.
        """
        state = history.begun(base, self.target_modules, self.dtype)
        factors = history.of_round(state, 0)
        sides = [min(factors[key_a(x)].shape[1], factors[key_b(x)].shape[0]) for x in layers_of(factors)]
        if 0 < self.rank_budget < max(sides) and self.energy == 1:
            remedy = "Or set method.energy below 1, to say that small components may be cut off"
            want = f"at least {max(sides)}, the smaller side of the largest layer, while method.energy is 1"
            raise ConfigError(problem("method.rank_budget", want, self.rank_budget, remedy))
        return state

    def admit(self, member: Member) -> Member:
        """Takes any rank from 1 to `max_rank`, any alpha above 0, and any depth unless multi-Krum compares products."""
        if member.depth and self.krum_byzantine:
            why = "Multi-Krum compares products of the same layers"
            raise ProtocolError(problem(f"depth of {member.id}", "0 with krum_byzantine", member.depth, why))
        largest = max(self.rank, self.max_rank)
        return averaging.any_mix(member, self.rank, self.alpha, largest, "method.max_rank")

    def broadcast(self, state: Tensors, since: int) -> Tensors:
        """Sends the stacks of the rounds after `since`, or the whole state where they are no longer apart."""
        return downlink.folded(history.lacking(state, since), state)

    def unpacked(self, job: ClientJob, received: Tensors) -> Tensors:
        """Decodes compressed stacks."""
        return downlink.unfolded(received, self.downlink)

    def replaces(self, received: Tensors) -> bool:
        """Whether clients merge this into the base alone."""
        return history.is_whole(received)

    def fold(self, total: stacking.Stack | None, update: Tensors, member: Member, weight: int) -> stacking.Stack:
        """Adds the factors; what robust folding compares at the end is kept until then.

        Raises:
            WireError: training diverged, and a stack might overflow its dtype.
        """
        reply = stacking.Reply(member, weight, self._scale(member), update)
        limit = 0.0 if self._keeps else self.clip_norm
        return (total or stacking.Stack()).add(reply, keep=self._keeps, limit=limit)

    def finish(self, state: Tensors, total: stacking.Stack, weight: int) -> Tensors:
        """Adds the mean of the products, as the server optimiser says, and recompresses what is past the budget."""
        number = history.last(state)
        held = history.of_round(state, number) if self.start == "warm" else {}
        limit = self.clip_norm if self._keeps else 0.0
        mean = total.mean(history.of_round(state, 0), held, self.krum_byzantine, limit)
        p, q = self.server_optimizer.shares()
        covered = mean.covered(held)
        momentum = {n.removeprefix(FIRST): a for n, a in state.items() if n.startswith(FIRST)}
        stays = {layer: 1 - p * c for layer, c in covered.items()}
        after = self._after(state, number + 1, stacking.stacked((stays, held), (p, mean.factors), (q, momentum)))
        if self.server_optimizer.name != "none":
            goes, beta = {layer: -c for layer, c in covered.items()}, self.server_optimizer.beta1
            change = stacking.stacked((goes, held), (1.0, mean.factors), (beta, momentum))
            kept, _ = stacking.compact(change, self.rank_budget, self.energy)
            after.update({FIRST + name: array for name, array in kept.items()})
        return {**after, **trust.noted(mean.left_out, mean.clipped)}

    def notes(self, state: Tensors, total: stacking.Stack) -> dict[str, list[str]]:
        """Names whom multi-Krum left out and who was clipped, and says what recompression cut off."""
        cut = {"cut_off": [f"{state[_ERROR][0]:.3g} of the norm"]} if _ERROR in state else {}
        return {**trust.notes(state), **cut}

    def install(self, job: ClientJob, received: Tensors) -> None:
        """Merges each missed stack into the base, in order; a warm start keeps its leading components to train."""
        if history.is_whole(received):
            job.rebase()
        for factors in history.missed(received):
            job.merge(factors if self.start == "fresh" else _beyond(factors, job.member))
        if self.start == "warm":
            newest = depth.carried(history.of_round(received, history.last(received)), job.member.depth)
            job.attach(self._spec(job.member, newest), self._leading(job, newest))

    def client_update(self, job: ClientJob, expected: Manifest) -> Tensors:
        """Trains an adapter of this client's own rank."""
        spec = self._spec(job.member, expected.names)
        return averaging.as_sent(job.train_fresh(spec) if self.start == "fresh" else job.train_attached(), expected)

    def encode(self, update: Tensors, manifest: Manifest) -> Iterable[memoryview | bytes]:
        """Balances the factors where a threshold would otherwise keep only the noise that A began with."""
        return super().encode(balanced(update) if self.uplink.codec == "ternary" else update, manifest)

    def template(self, state: Tensors, member: Member) -> Manifest:
        """Expects A of (r_k, I) and B of (O, r_k) for every layer that carries the client's adapter."""
        return averaging.of_rank(depth.carried(history.of_round(state, 0), member.depth), member.rank)

    def export(self, state: Tensors, folder: Path, base_model: str) -> None:
        """Writes all rounds as one adapter: their stacks, stacked, with scale 1."""
        save_product(folder, history.joined(state), base_model)

    @property
    def _keeps(self) -> bool:
        """Whether updates are judged only when all are there: beside others, or beside what a client began with."""
        return bool(self.krum_byzantine or (self.clip_norm and self.start == "warm"))

    def _after(self, state: Tensors, number: int, step: dict[str, Array]) -> dict[str, Array]:
        """The history with this round's step: added to it, or in the place of all."""
        past = {n: a for n, a in state.items() if history.is_past(n) or downlink.is_code(n)}
        added = {**past, **downlink.coded(number, step, self.downlink)}
        if self.start == "fresh":
            if not 0 < self.rank_budget < history.rank(added):
                return added
            step = history.joined(added)
        small, error = stacking.compact(step, self.rank_budget, self.energy)
        cut = {_ERROR: np.array([error])} if self.energy < 1 else {}
        return {**history.numbered(0, history.of_round(state, 0)), **history.numbered(number, small), **cut}

    def _leading(self, job: ClientJob, factors: Tensors) -> dict[str, Array]:
        """A client's first r_k components as an adapter of its own scale; where there are fewer, rows of a fresh one.

        A and B are equally long, as they are in the state, or A is as long as a fresh one. AdamW's steps have one
        length whatever they change, so the former's short rows turn within a round. The latter's keep their directions:
        they learn slowly where both sides take one rate, and steadily where B's is many times A's.
        """
        start = {name: array.copy() for name, array in job.fresh(self._spec(job.member, factors)).items()}
        share = self._scale(job.member) ** -0.5
        own = averaging.sliced(factors, job.member.rank, share, share)
        for layer in layers_of(own):
            a_ri, b_or = own[key_a(layer)], own[key_b(layer)]
            if self.warm_length == "fresh":
                a_ri, b_or = lengthened(a_ri, b_or, start[key_a(layer)])
            start[key_a(layer)][: len(a_ri)] = a_ri
            start[key_b(layer)][:, : b_or.shape[1]] = b_or
        return start

    def _spec(self, member: Member, names: Tensors | list[str]) -> LoraSpec:
        return LoraSpec(tuple(layers_of(names)), member.rank, member.alpha, self.dropout, self.rslora)

    def _scale(self, member: Member) -> float:
        return lora_scale(member.rank, member.alpha, self.rslora)


def _beyond(factors: Tensors, member: Member) -> dict[str, Array]:
    """Leaves out the leading components that a client trains itself: as many as its rank, in the layers it adapts."""
    rank, own = member.rank, depth.carried(factors, member.depth)
    rest = {name: array[rank:] if name.endswith("/A") else array[:, rank:] for name, array in own.items()}
    return {**factors, **rest}
