"""Nodes that still work on a round which has closed without them.

A node does one task after another, so a new task would wait behind the old one, be late as well, and so on for ever.
Such a node gets no task until it has answered; what it answers is not used, since its round is over.
"""

import time
from collections.abc import Collection, Mapping

from flwr.serverapp import Grid

from fedtune.flower.roster import Node, pause, pull


class Late:
    """Who owes the answer to a closed round."""

    def __init__(self) -> None:
        self._owed: dict[str, tuple[Node, int]] = {}

    @property
    def clients(self) -> set[str]:
        """Their client ids."""
        return {node.member.id for node, _ in self._owed.values()}

    def add(self, waiting: Mapping[str, Node], version: int) -> None:
        """Takes over the messages that a round, played on `version` of the state, has no reply to."""
        self._owed |= {message: (node, version) for message, node in waiting.items()}

    def hear(self, grid: Grid) -> None:
        """Takes note of who has answered, and of who is gone."""
        if not self._owed:
            return
        here = set(grid.get_node_ids())
        self._owed = {message: owed for message, owed in self._owed.items() if owed[0].id in here}
        for reply in pull(grid, self._owed):
            node, version = self._owed.pop(reply.metadata.reply_to_message_id)
            node.version = -1 if reply.has_error() else version  # a turn that failed has put the model back to the base

    def await_free(self, grid: Grid, clients: Collection[str], needed: int, wait_s: float) -> None:
        """Waits until `needed` of `clients` owe nothing, at most `wait_s`."""
        began = time.monotonic()
        while time.monotonic() < began + wait_s:
            self.hear(grid)
            if not self._owed or len(set(clients) - self.clients) >= needed:
                return
            pause(began)
