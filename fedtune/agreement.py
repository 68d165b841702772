"""Which of a round's updates count: those on the model that most agree on, and of these the trusted ones.

Where clients may be hostile (f > 0) each counts for one, whatever weight it claims, and those on another model than the
majority's count among the f: with d of them left out, multi-Krum looks for f' hostile ones among the n' others, the
largest f' <= f that leaves n' >= 2 f' + 3. If that is less than f - d, or no majority agrees, nobody is trusted.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from fedtune.kspace import Sum, joined, trusted

Total = Mapping[bytes, Mapping[str, Sum]]
"""Updates by the digest of the model they were made on; within it one sum a client, or one of all under an empty id."""


@dataclass(frozen=True)
class Verdict:
    """What counts of a round.

    Attributes:
        model: the digest that most agree on.
        used: the sum of the updates that count; None where too few can be trusted.
        notes: clients whose model disagreed, those multi-Krum left out, those whose K-vector was clipped; f' where it
            is less than f; and why nothing is used.
    """

    model: bytes
    used: Sum | None
    notes: dict[str, list[str]]


def folded(total: Total | None, model: bytes, client: str, mine: Sum) -> Total:
    """Adds an update to those of the same model and client."""
    sums = (total or {}).get(model, {})
    return {**(total or {}), model: {**sums, client: sums[client].plus(mine) if client in sums else mine}}


def judged(total: Total, byzantine: int) -> Verdict:
    """Finds the model that most weight agrees on, and the updates on it that count.

    Args:
        total: a round's updates; with `byzantine`, one sum of weight 1 a client.
        byzantine: f, clients that may be hostile.
    """
    groups = {digest: joined(sums) for digest, sums in total.items()}
    everyone = joined({digest.hex(): group for digest, group in groups.items()})
    model = max(groups, key=lambda digest: (groups[digest].weight, digest))
    here = groups[model]
    if not byzantine:
        return Verdict(model, here, _named(everyone, here, here))
    agree, left_out = len(here.members), len(everyone.members) - len(here.members)
    f = min(byzantine, (agree - 3) // 2)
    if agree <= left_out or f < max(0, byzantine - left_out):
        why = f"{agree} of {len(everyone.members)} clients agree on a model, too few for krum_byzantine {byzantine}"
        return Verdict(model, None, {"unchanged": [why]})
    used = joined(trusted(total[model], f))
    fewer = {"krum_byzantine": [f"{f} of {byzantine}"]} if f < byzantine else {}
    return Verdict(model, used, _named(everyone, here, used) | fewer)


def _named(everyone: Sum, here: Sum, used: Sum) -> dict[str, list[str]]:
    left_out = here.members - used.members
    found = {"disagreed": everyone.members - here.members, "left_out": left_out, "clipped": used.clipped}
    return {note: sorted(clients) for note, clients in found.items() if clients}
