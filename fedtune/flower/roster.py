"""The nodes of a run on Flower: who they are, what they hold, and how messages reach them."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from flwr.app import Array, Message
from flwr.serverapp import Grid

from fedtune.capability import Capability
from fedtune.errors import FedtuneError, ProtocolError, RoundError, problem
from fedtune.flower.messages import as_array, content
from fedtune.flower.replies import read_hello
from fedtune.flower.visit import BYE
from fedtune.method import Member

T = TypeVar("T")
Say = Callable[..., None]
Admit = Callable[[Member, Capability | None], Member]
"""Takes a client, as it says it is and with what it measured, into the run; raises FedtuneError when it cannot."""

PULL_S = 1.0
"""Most seconds between looks for replies; Flower's own loop waits 3. Each look is a request to the SuperLink. A node
asks for its next task 3 s after its reply, so that a look within one second costs no time."""
HELLO_S = 120.0
"""Seconds a node may take to say who it is."""
BYE_S = 20.0
"""Seconds the end of a run waits for resident workers to be told."""


@dataclass
class Node:
    """A node that has said who it is; `version` of the state its model holds, -1 for only the base."""

    id: int
    member: Member
    resident: bool
    version: int = -1


class Roster:
    """The nodes that are there, by client id."""

    def __init__(self, grid: Grid, admit: Admit, greeting: Array, say: Say) -> None:
        self.grid = grid
        self._take, self._greeting, self._say = admit, greeting, say
        self._nodes: dict[int, Node] = {}
        self._failed: set[int] = set()

    @property
    def nodes(self) -> dict[str, Node]:
        """The nodes by client id, sorted by it."""
        return {node.member.id: node for node in sorted(self._nodes.values(), key=lambda node: node.member.id)}

    def assemble(self, needed: int, wait_s: float) -> None:
        """Greets new nodes, and waits until `needed` are there; raises RoundError after `wait_s`."""
        until = time.monotonic() + wait_s
        self._failed.clear()  # whoever failed to say who it is is asked once more before each round
        while True:
            here = set(self.grid.get_node_ids())
            self._nodes = {number: node for number, node in self._nodes.items() if number in here}
            self._greet(sorted(here - self._nodes.keys() - self._failed))
            if len(self._nodes) >= needed:
                return
            if time.monotonic() > until:
                remedy = "Start more SuperNodes, or see rounds.min_clients; events.jsonl says who was refused"
                raise RoundError(problem("nodes", f"{needed} within {wait_s:g} s", len(self._nodes), remedy))
            time.sleep(PULL_S / 2)

    def absent(self, nodes: Iterable[Node]) -> set[int]:
        """Ids of those nodes that Flower has lost."""
        return {node.id for node in nodes} - set(self.grid.get_node_ids())

    def dismiss(self) -> None:
        """Tells resident workers that the run is over; one that does not hear it ends by itself."""
        ids = [node.id for node in self._nodes.values() if node.resident]
        for _ in self._ask(as_array(BYE, b"\0"), ids, BYE_S):
            continue

    def _greet(self, ids: Sequence[int]) -> None:
        """Asks nodes who they are."""
        heard = set()
        for number, reply in self._ask(self._greeting, ids, HELLO_S):
            heard.add(number)
            self._admit(number, reply)
        self._failed |= set(ids) - heard

    def _ask(self, array: Array, ids: Sequence[int], wait_s: float) -> Iterable[tuple[int, Message]]:
        """Sends the same to several nodes, and yields what comes back in time."""
        messages = [Message(content(array), dst_node_id=i, message_type="query", ttl=wait_s) for i in ids]
        waiting = push(self.grid, [(message, message.metadata.dst_node_id) for message in messages])
        began = time.monotonic()
        while waiting and time.monotonic() < began + wait_s:
            for reply in pull(self.grid, waiting):
                yield waiting.pop(reply.metadata.reply_to_message_id), reply
            if waiting:
                pause(began)

    def _admit(self, number: int, reply: Message) -> None:
        try:
            stated, able, resident = read_hello(reply)
            member = self._take(stated, able)
            if member.id in self.nodes:
                raise ProtocolError(problem("client.id", "another for every node", f"{member.id} twice"))
        except FedtuneError as error:
            self._failed.add(number)
            self._say("client_refused", f"a node was refused: {error}", node=str(number), reason=str(error))
            return
        self._nodes[number] = Node(number, member, resident)
        self._say("client_joined", **member.described())
        if able is not None and member.depth and not stated.depth:
            seconds = able.seconds.of(member.depth, member.rank)
            self._say("client_planned", **member.described(), seconds=seconds)


def pause(began: float) -> None:
    """Waits before the next look for replies: a third of the time waited so far, from PULL_S / 20 up to PULL_S."""
    time.sleep(min(PULL_S, max(PULL_S / 20, (time.monotonic() - began) / 3)))


def push(grid: Grid, messages: Sequence[tuple[Message, T]]) -> dict[str, T]:
    """Sends messages, what they share once; returns what belongs to each under the id that replies will name."""
    stored = set(grid.push_messages([message for message, _ in messages]))
    return {m.metadata.message_id: value for m, value in messages if m.metadata.message_id in stored}


def pull(grid: Grid, waiting: Mapping[str, T]) -> list[Message]:
    """Fetches the replies that are there, in no order that matters."""
    if not waiting:
        return []
    return [reply for reply in grid.pull_messages(list(waiting)) if reply.metadata.reply_to_message_id in waiting]
