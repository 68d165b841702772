"""Dealing rows out to simulated clients. Every row goes to exactly one client, and the seed decides to which.

iid        equal shares of a shuffle
label      each label's rows by shares from a Dirichlet distribution  (Hsu et al. 2019, arXiv 1909.06335)
quantity   sizes from a Dirichlet distribution
natural    whole values of a key: the largest value to the first client, and so on, round and round
"""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from fedtune.config.schema import SimulationConfig
from fedtune.errors import DataError, problem

Indices: TypeAlias = npt.NDArray[np.int64]


def split(
    rows: int, config: SimulationConfig, rng: np.random.Generator, keys: Sequence[object] | None = None
) -> list[Indices]:
    """Returns the rows of each client, in rising order.

    Args:
        rows: how many there are.
        config: clients, kind of partition, concentration, fewest rows a client gets.
        rng: decides.
        keys: label of each row (`label`) or whose it is (`natural`).

    Raises:
        DataError: there are too few rows or keys for so many clients.
    """
    clients = config.clients
    if rows < clients * config.min_rows:
        want = f"at least {clients * config.min_rows} ({clients} clients with {config.min_rows} each)"
        raise DataError(problem("rows to deal out", want, rows, "Lower simulation.clients or simulation.min_rows"))
    if config.partition in ("label", "natural") and keys is None:
        column = "data.label" if config.partition == "label" else "data.client_key"
        raise DataError(problem(column, f"a column, for simulation.partition = {config.partition!r}", "none"))
    if config.partition == "natural" and keys is not None:
        return _natural(keys, config)
    if config.partition == "label" and keys is not None:
        parts = _by_label(keys, config, rng)
    else:
        share = rng.dirichlet([config.concentration] * clients) if config.partition == "quantity" else None
        parts = _shares(rng.permutation(rows), np.full(clients, 1 / clients) if share is None else share)
    return [np.sort(part) for part in _topped_up(parts, config.min_rows)]


def _shares(rows: Indices, shares: npt.NDArray[np.float64]) -> list[Indices]:
    """Cuts `rows` in order, at the rounded sums of `shares`."""
    bounds = np.rint(np.cumsum(shares) * len(rows)).astype(int)
    return list(np.split(rows, bounds[:-1]))


def _by_label(keys: Sequence[object], config: SimulationConfig, rng: np.random.Generator) -> list[Indices]:
    parts: list[list[Indices]] = [[] for _ in range(config.clients)]
    for members in _groups(keys).values():
        shares = rng.dirichlet([config.concentration] * config.clients)
        for part, piece in zip(parts, _shares(rng.permutation(members), shares), strict=True):
            part.append(piece)
    return [np.concatenate(part) for part in parts]


def _natural(keys: Sequence[object], config: SimulationConfig) -> list[Indices]:
    groups = sorted(_groups(keys).items(), key=lambda item: (-len(item[1]), item[0]))
    if len(groups) < config.clients:
        remedy = "Lower simulation.clients, or choose another partition"
        raise DataError(problem("values of data.client_key", f"at least {config.clients}", len(groups), remedy))
    parts = [np.concatenate([g for _, g in groups[i :: config.clients]]) for i in range(config.clients)]
    if min(map(len, parts)) < config.min_rows:
        want = f"{config.min_rows} rows for every client"
        raise DataError(problem("simulation.min_rows", want, min(map(len, parts)), "Lower it, or simulation.clients"))
    return [np.sort(part) for part in parts]


def _groups(keys: Sequence[object]) -> dict[str, Indices]:
    """Rows of each key, in order of the key's text."""
    found: dict[str, list[int]] = {}
    for row, key in enumerate(keys):
        found.setdefault(str(key), []).append(row)
    return {key: np.array(found[key], np.int64) for key in sorted(found)}


def _topped_up(parts: list[Indices], min_rows: int) -> list[Indices]:
    """Moves single rows from the largest part to those that have too few."""
    for i in range(len(parts)):
        while len(parts[i]) < min_rows:
            donor = max(range(len(parts)), key=lambda j: len(parts[j]))
            parts[i], parts[donor] = np.append(parts[i], parts[donor][-1]), parts[donor][:-1]
    return parts
