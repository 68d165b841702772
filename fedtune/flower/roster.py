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
AGAIN_S = 5.0
"""Seconds until a node that did not say who it is, or was refused, is asked again; each time twice as many."""
LONGEST_S = 60.0
"""Most seconds until then."""
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

    def __init__(self, grid: Grid, admit: Admit, greeting: Array, say: Say, hello_s: float = HELLO_S) -> None:
        self.grid = grid
        self._take, self._greeting, self._say, self._hello_s = admit, greeting, say, hello_s
        self._nodes: dict[int, Node] = {}
        self._pending: dict[str, tuple[int, float]] = {}  # by message: which node was greeted, and until when it counts
        self._failures: dict[int, tuple[int, float]] = {}  # how often a node failed, and when it is asked again
        self._workers: set[int] = set()  # nodes that may have a resident worker
        self._begun = False

    @property
    def nodes(self) -> dict[str, Node]:
        """The nodes by client id, sorted by it."""
        return {node.member.id: node for node in sorted(self._nodes.values(), key=lambda node: node.member.id)}

    def assemble(self, needed: int, wait_s: float) -> None:
        """Greets new nodes and waits until `needed` are there; the first time also for every node that was greeted.

        Later, a node that does not answer delays nobody: its hello is looked at again before each round. Whoever failed
        at it, or was refused, is asked again after a while.

        Raises:
            RoundError: fewer are there after `wait_s`.
        """
        began = time.monotonic()
        patience = 0.0 if self._begun else min(wait_s, self._hello_s)
        self._begun = True
        while True:
            self._look()
            waited = time.monotonic() - began
            if len(self._nodes) >= needed and (not self._pending or waited > patience):
                return
            if waited > wait_s:
                remedy = "Start more SuperNodes, or see rounds.min_clients; events.jsonl says who was refused"
                raise RoundError(problem("nodes", f"{needed} within {wait_s:g} s", len(self._nodes), remedy))
            pause(began)

    def absent(self, nodes: Iterable[Node]) -> set[int]:
        """Ids of those nodes that Flower has lost."""
        return {node.id for node in nodes} - set(self.grid.get_node_ids())

    def dismiss(self) -> None:
        """Tells resident workers that the run is over; one that does not hear it ends by itself."""
        try:
            ids = sorted(self._workers & set(self.grid.get_node_ids()))
            waiting = dict.fromkeys(self._send(as_array(BYE, b"\0"), ids, BYE_S), None)
            began = time.monotonic()
            while waiting and time.monotonic() < began + BYE_S:
                for reply in pull(self.grid, waiting):
                    del waiting[reply.metadata.reply_to_message_id]
                if waiting:
                    pause(began)
        except Exception as error:  # the run's own end must not be hidden behind this, whatever Flower raises
            self._say("dismiss_failed", reason=f"{type(error).__name__}: {error}")

    def _look(self) -> None:
        """Greets who is new, and hears who has answered."""
        now, here = time.monotonic(), set(self.grid.get_node_ids())
        self._nodes = {number: node for number, node in self._nodes.items() if number in here}
        self._failures = {number: failure for number, failure in self._failures.items() if number in here}
        for message, (number, until) in list(self._pending.items()):
            if number not in here or now > until:
                del self._pending[message]
                self._fail(number)
        resting = {number for number, (_, again) in self._failures.items() if now < again}
        greeted = {number for number, _ in self._pending.values()}
        new = sorted(here - self._nodes.keys() - greeted - resting)
        sent = self._send(self._greeting, new, self._hello_s)
        self._pending |= {message: (number, now + self._hello_s) for message, number in sent.items()}
        heard = [(self._pending.pop(r.metadata.reply_to_message_id)[0], r) for r in pull(self.grid, self._pending)]
        for number, reply in sorted(heard, key=lambda pair: pair[0]):
            self._admit(number, reply)

    def _send(self, array: Array, ids: Sequence[int], ttl: float) -> dict[str, int]:
        """Sends the same to several nodes; returns which node each message went to."""
        messages = [Message(content(array), dst_node_id=i, message_type="query", ttl=ttl) for i in ids]
        return push(self.grid, [(message, message.metadata.dst_node_id) for message in messages])

    def _fail(self, number: int) -> None:
        """Notes that a node is not to be asked for a while: AGAIN_S seconds, then twice as long each time."""
        times = self._failures.get(number, (0, 0.0))[0]
        self._failures[number] = times + 1, time.monotonic() + min(AGAIN_S * 2**times, LONGEST_S)

    def _admit(self, number: int, reply: Message) -> None:
        self._workers.add(number)
        try:
            stated, able, resident = read_hello(reply)
            if not resident:
                self._workers.discard(number)
            member = self._take(stated, able)
            if member.id in self.nodes:
                raise ProtocolError(problem("client.id", "another for every node", f"{member.id} twice"))
        except FedtuneError as error:
            self._fail(number)
            self._say("client_refused", f"a node was refused: {error}", node=str(number), reason=str(error))
            return
        self._failures.pop(number, None)
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
