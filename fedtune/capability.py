"""What a client can do, as it measured it, and the adapter that is planned for it.

A step runs forward through the whole model, and backward down to the lowest block with an adapter. So what a round
costs, in seconds or in bytes, is nearly a line in the depth k, whose slope is a line in the rank r:

    cost(k, r) = fixed + k (block + r * rank)

Given the seconds that a round should take, each client gets the deepest adapter that fits them and its memory, at the
method's rank, as LEGEND does (arXiv 2412.20004); where not even one block fits, the rank falls. A plan depends on one
client alone, so nobody's coming or going changes another's. LEGEND also estimates costs anew from every round, and has
ranks rise towards the output; here a plan stands for the run, and its rank is the same in every block.
"""

from dataclasses import dataclass, replace

from fedtune.depth import blocks
from fedtune.lora import layers_of
from fedtune.method import Member, Method
from fedtune.rounds import admit
from fedtune.tensors import Tensors


@dataclass(frozen=True, slots=True)
class Cost:
    """What a round costs at depth k and rank r: `fixed` + k (`block` + r `rank`); no part is negative."""

    fixed: float
    block: float
    rank: float

    def of(self, depth: int, rank: int) -> float:
        """Returns the cost of a round."""
        return self.fixed + depth * (self.block + rank * self.rank)


@dataclass(frozen=True, slots=True)
class Capability:
    """What a client measured: seconds of a round, bytes that training takes beside the model, and bytes free for it."""

    seconds: Cost
    memory: Cost
    room: float

    def fits(self, depth: int, rank: int, seconds: float) -> bool:
        """Whether a round stays within `seconds` and the memory there is."""
        return self.seconds.of(depth, rank) <= seconds and self.memory.of(depth, rank) <= self.room


def plan(able: Capability, deepest: int, rank: int, seconds: float) -> tuple[int, int]:
    """Returns the depth, 1 to `deepest`, and the rank, 1 to `rank`, that a client should train at.

    Guarantees: a function of its arguments alone. More time or memory, or a smaller cost, never gives fewer blocks,
    nor at the same depth a lower rank. The predicted time is above `seconds` only at depth 1 and rank 1; it is below
    by a block's cost or more only at full depth, or where memory is the limit.
    """
    depth = max((k for k in range(1, deepest + 1) if able.fits(k, rank, seconds)), default=0)
    if depth:
        return depth, rank
    return 1, max((r for r in range(1, rank + 1) if able.fits(1, r, seconds)), default=1)


def planned(method: Method, state: Tensors, stated: Member, able: Capability, seconds: float) -> Member:
    """Admits a client with the depth and rank planned for it.

    Args:
        method: of the run.
        state: any version of the shared state.
        stated: the client as its own configuration says; a depth set there stands, and so does a rank.
        able: what it measured.
        seconds: what a round should take.

    Raises:
        ProtocolError: the method cannot take it.
    """
    top = admit(method, stated)
    if stated.depth:
        return top
    count = len(blocks(layers_of(method.template(state, top).names)))
    depth, rank = plan(able, count, top.rank, seconds)
    return admit(method, replace(stated, rank=stated.rank or rank, depth=depth))
