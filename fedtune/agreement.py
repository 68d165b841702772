"""Which of a round's updates count: those on the model that most weight agrees on, and of these the trusted ones."""

from collections.abc import Mapping

from fedtune.kspace import Sum, joined, trusted

Total = Mapping[bytes, Mapping[str, Sum]]
"""Updates by the digest of the model they were made on; within it one sum a client, or one of all under an empty id."""


def folded(total: Total | None, model: bytes, client: str, mine: Sum) -> Total:
    """Adds an update to those of the same model and client."""
    sums = (total or {}).get(model, {})
    return {**(total or {}), model: {**sums, client: sums[client].plus(mine) if client in sums else mine}}


def agreed(total: Total, byzantine: int) -> tuple[bytes, Sum]:
    """Returns the model that most weight agrees on, and the sum of its updates that count.

    Raises:
        RoundError: too few of them for multi-Krum.
    """
    model = max(total, key=lambda digest: (joined(total[digest]).weight, digest))
    return model, joined(trusted(total[model], byzantine) if byzantine else total[model])


def noted(total: Total, byzantine: int) -> dict[str, list[str]]:
    """Names the clients whose model disagreed, those multi-Krum left out, and those whose K-vector was clipped."""
    model, used = agreed(total, byzantine)
    here = joined(total[model]).members
    everyone = frozenset[str]().union(*(joined(sums).members for sums in total.values()))
    found = {"disagreed": everyone - here, "left_out": here - used.members, "clipped": used.clipped}
    return {note: sorted(clients) for note, clients in found.items() if clients}
