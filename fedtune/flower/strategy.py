"""The Strategy: `fedtune.rounds.Round` driven through Flower's Grid, for any method.

    start -> for each round: greet new nodes -> configure_train -> push, pull, fold as replies come -> aggregate_train

The rules are those of fedtune's own coordinator (`fedtune.rules`, `fedtune.selection`): a round below its quorum is
tried again and then ends the run with a RoundError, which Flower reports as `finished:failed`.
"""

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from fedtune import rules
from fedtune.capability import Capability, planned
from fedtune.config import Config, Shared
from fedtune.config.unused import unused
from fedtune.errors import ConfigError, FedtuneError, ProtocolError, RoundError, problem
from fedtune.flower.late import Late
from fedtune.flower.messages import content
from fedtune.flower.orders import Orders, hello, welcome
from fedtune.flower.record import RoundLog, RunFolder
from fedtune.flower.replies import Lack, Update, read_update
from fedtune.flower.roster import HELLO_S, Node, Roster, pause, pull, push
from fedtune.method import BaseModel, Member
from fedtune.rounds import Round, admit, begin
from fedtune.selection import asked, select
from fedtune.tensors import Tensors, digest

LOOK_S = 3.0
"""Seconds between looks at which of the nodes that owe an update Flower has lost."""


@dataclass
class _Open:
    """The open round. `waiting` holds the node behind each message that has no reply yet, in any attempt."""

    round: Round
    log: RoundLog
    orders: Orders
    target: int = 0
    waiting: dict[str, Node] = field(default_factory=dict)
    began: float = 0.0
    quorum_at: float | None = None
    lacked: set[str] = field(default_factory=set)


class FedtuneStrategy(Strategy):  # type: ignore[misc]  # flwr is an extra, so its types are not there to check
    """Runs a fedtune configuration on Flower.

    Attributes:
        state: the shared state after the last closed round.
        digest: its SHA-256.
    """

    def __init__(self, config: Config, base: BaseModel, folder: RunFolder | None = None) -> None:
        """Prepares version 0.

        Args:
            config: the whole configuration; `[rounds]` says when a round closes.
            base: the base model as the coordinator sees it (`fedtune.base.open_base`).
            folder: where adapters and records go; None keeps nothing but `state`.
        """
        self._config, self._shared, self._base, self._folder = config, Shared.of(config), base, folder
        self.state: Tensors = begin(config.method, base, config.run.seed)
        self.digest = digest(self.state)
        self._greeting = welcome(self._shared, base.digest, "")
        self._roster: Roster | None = None
        self._open: _Open | None = None
        self._late = Late()
        self._taken: dict[str, int] = {}  # round of each client's last update that was folded in
        self._plans: dict[Member, Member] = {}  # what was planned for a client, by what it said of itself

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int | None = None,
        timeout: float | None = None,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Runs all rounds.

        Args:
            grid: Flower's.
            initial_arrays: None or empty: version 0 is the method's.
            num_rounds: rounds; `rounds.count` when None.
            timeout: not used: `rounds.deadline_s` is the limit.
            train_config: None or empty: `[training]` is part of the settings that all nodes check.
            evaluate_config: None or empty, as `evaluate_fn`: `fedtune evaluate` reads the adapter directories.
            evaluate_fn: None.

        Raises:
            RoundError: a round missed its quorum in every attempt; the run must not count as completed.
            FedtuneError: whatever else ends a run.
        """
        if initial_arrays or train_config or evaluate_config or evaluate_fn:
            raise ConfigError("FedtuneStrategy.start: expected grid and num_rounds only; the rest is in --run-config")
        self._greeting = welcome(self._shared, self._base.digest, str(grid.run.run_id))
        patience = max(HELLO_S, self._config.rounds.deadline_s) if self._config.rounds.plan_s else HELLO_S
        self._roster = Roster(grid, self._admit, hello(self._greeting), self._event, patience)
        try:
            return self._run(self._roster, num_rounds or self._config.rounds.count)
        except Exception as error:  # recorded whatever it is: Flower's own errors end a run, too
            reason = str(error) if isinstance(error, FedtuneError) else f"{type(error).__name__}: {error}"
            self._event("run_finished", f"error: {reason}", outcome="failed", reason=reason)
            raise
        finally:
            self._roster.dismiss()
            self._roster = None

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Draws the nodes of this attempt and returns their messages; `arrays` and `config` are not used.

        Raises:
            ConfigError: something else than `start` called it, such as a wrapper for differential privacy.
        """
        roster = self._driven()
        rounds, nodes = self._config.rounds, roster.nodes
        log = self._open.log if self._open else RoundLog(server_round, attempt=0)
        log.attempt += 1
        here = {node.id for node in nodes.values()}
        waiting = {m: node for m, node in self._open.waiting.items() if node.id in here} if self._open else {}
        busy = {node.member.id for node in waiting.values()} | self._late.clients
        free = [client for client in nodes if client not in log.weights and client not in busy]
        target = self._target(nodes.keys() | log.weights.keys())
        count = max(0, asked(target, rounds.over_select) - len(log.weights))
        chosen = select(self._shared.seed, server_round, log.attempt, free, count)
        current = self._open.round if self._open else Round(self._shared.method, self.state, server_round)
        tasks = Orders(current, self.digest, self._greeting, [nodes[client].member for client in chosen])
        self._open = _Open(current, log, tasks, target, waiting, began=time.monotonic())
        self._event("round_started", round=server_round, attempt=log.attempt, selected=list(chosen))
        return [self._message(self._open, nodes[client]) for client in chosen]

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord, MetricRecord]:
        """Folds `replies`, in order of client id, and closes the round. `start` has folded them as they came.

        Returns:
            No arrays (`state` holds the result, `rounds/` the adapter), and the weighted means of the clients' metrics.
        """
        work = self._opened()
        found = [(work.waiting.pop(reply.metadata.reply_to_message_id), reply) for reply in replies]
        for node, reply in sorted(found, key=lambda pair: pair[0].member.id):
            self._take(work, node, reply)
        self._late.add(work.waiting, server_round - 1)
        self.state = work.round.close()
        self.digest = digest(self.state)
        work.log.notes = work.round.notes()
        if self._folder:
            self._folder.close_round(self.state, self.digest, work.log)
        self._open = None
        return ArrayRecord(), MetricRecord(dict(_means(work.log)))

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Sends nothing: `fedtune evaluate` reads the adapter directories."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Has nothing to aggregate."""
        return None

    def summary(self) -> None:
        """Says what will be run."""
        method, count = self._shared.method.name, self._config.rounds.count
        self._event("ready", f"{method}, {count} rounds, settings {self._shared.digest()[:12]}")
        if said := unused(self._config):
            self._event("note", f"note: {said}", said=said)

    def _run(self, roster: Roster, count: int) -> Result:
        self.summary()
        result, needed = Result(), rules.needed(self._config.rounds)
        for number in range(1, count + 1):
            while True:
                roster.assemble(needed, self._config.rounds.deadline_s)
                quorum = rules.quorum_of(self._config.rounds, self._target(roster.nodes.keys()))
                self._late.await_free(roster.grid, roster.nodes, quorum, self._config.rounds.deadline_s)
                messages = self.configure_train(number, ArrayRecord(), ConfigRecord(), roster.grid)
                if self._gather(roster, self._opened(), list(messages)):
                    break
            _, result.train_metrics_clientapp[number] = self.aggregate_train(number, [])
        if self._folder:
            self._folder.finish(count, self.digest)
        return result

    def _target(self, clients: Collection[str]) -> int:
        """How many updates a round aims for, with these clients."""
        return self._config.rounds.clients or max(self._config.rounds.min_clients, len(clients))

    def _admit(self, stated: Member, able: Capability | None) -> Member:
        """Takes a client into the run; what was planned for it once stands."""
        seconds = self._config.rounds.plan_s
        if able is None or not seconds:
            return admit(self._shared.method, stated)
        if stated not in self._plans:
            self._plans[stated] = planned(self._shared.method, self.state, stated, able, seconds)
        return self._plans[stated]

    def _message(self, work: _Open, node: Node) -> Message:
        """The task of one node."""
        client = node.member.id
        order = work.orders.order(node.member, node.version if node.resident else -1, self._taken.get(client, 0))
        size = len(order.array.data)
        work.log.ledger += [
            (client, "down", "control", size - order.payload),
            (client, "down", "payload", order.payload),
        ]
        ttl = self._config.rounds.deadline_s + HELLO_S
        return Message(content(order.array, order.turn), dst_node_id=node.id, message_type="train", ttl=ttl)

    def _gather(self, roster: Roster, work: _Open, messages: Sequence[Message]) -> bool:
        """Takes replies until the rules close the round (True) or want another attempt (False)."""
        by_id = {node.id: node for node in roster.nodes.values()}
        work.waiting |= push(roster.grid, [(message, by_id[message.metadata.dst_node_id]) for message in messages])
        absent: set[int] = set()
        looked = time.monotonic()
        while True:
            for reply in pull(roster.grid, work.waiting):
                self._take(work, work.waiting.pop(reply.metadata.reply_to_message_id), reply)
            if time.monotonic() - looked > LOOK_S:
                self._late.hear(roster.grid)
                absent, looked = roster.absent(work.waiting.values()), time.monotonic()
            move = self._decide(work, sum(node.id not in absent for node in work.waiting.values()))
            if move is rules.Move.FAIL:
                raise self._failure(work)
            if move is not rules.Move.WAIT:
                return move is rules.Move.CLOSE
            pause(work.began)

    def _decide(self, work: _Open, outstanding: int) -> rules.Move:
        """Applies the rules. In Flower a reply is final: when nobody can answer any more, nothing is awaited."""
        rounds, now, accepted = self._config.rounds, time.monotonic(), len(work.log.weights)
        if work.quorum_at is None and accepted >= rules.quorum_of(rounds, work.target):
            work.quorum_at = now
        elapsed = now - work.began if outstanding else rounds.deadline_s
        since = None if work.quorum_at is None else now - work.quorum_at
        return rules.decide(rules.View(work.target, accepted, outstanding, elapsed, since, work.log.attempt), rounds)

    def _take(self, work: _Open, node: Node, reply: Message) -> None:
        """Folds one reply in, or says why not; a node that lacks a version is sent it."""
        client, number = node.member.id, work.round.number
        try:
            update = read_update(reply, client, self.digest, self._config.server.max_update_mb * 2**20)
            if isinstance(update, Lack):
                self._resend(work, node, update.have)
                return
            work.round.add(node.member, update.payload, update.weight)
        except FedtuneError as error:
            node.version = -1
            text = f"round {number}: the reply of {client} was refused: {error}"
            self._event("update_refused", text, client=client, round=number, reason=str(error))
            return
        node.version, self._taken[client] = number - 1, number
        self._accepted(work.log, client, update)

    def _accepted(self, log: RoundLog, client: str, update: Update) -> None:
        size = update.payload.nbytes
        log.weights[client], log.metrics[client] = update.weight, update.metrics
        log.ledger += [(client, "up", "control", update.control), (client, "up", "payload", size)]
        self._event("update_accepted", round=log.number, client=client, weight=update.weight, bytes=size)

    def _resend(self, work: _Open, node: Node, have: int) -> None:
        client = node.member.id
        if client in work.lacked or not node.resident or node.version == -1:
            raise ProtocolError(problem(f"reply of {client}", "an update", "another request for the state"))
        if not -1 <= have < work.round.number or have == node.version:
            raise ProtocolError(problem(f"version held by {client}", "one that leads on", have))
        work.lacked.add(client)
        node.version = have
        work.waiting.update(push(self._driven().grid, [(self._message(work, node), node)]))

    def _failure(self, work: _Open) -> RoundError:
        log, want = work.log, f"{rules.quorum_of(self._config.rounds, work.target)} updates"
        self._event("round_failed", round=log.number, attempt=log.attempt, accepted=len(log.weights))
        got = f"{len(log.weights)} after {log.attempt} attempts"
        return RoundError(problem(f"round {log.number}", want, got, "The reasons are above and in events.jsonl"))

    def _driven(self) -> Roster:
        if self._roster is None:
            raise ConfigError(
                "FedtuneStrategy: expected to be started itself, got wrapped in another strategy. A wrapper sees one "
                "packed array a node, not the numbers in it, so it could neither clip them nor add noise"
            )
        return self._roster

    def _opened(self) -> _Open:
        if self._open is None:
            raise ConfigError("FedtuneStrategy.aggregate_train: expected configure_train before it")
        return self._open

    def _event(self, event: str, text: str = "", **fields: object) -> None:
        if self._folder:
            self._folder.event(event, text, **fields)


def _means(log: RoundLog) -> dict[str, float]:
    """Weighted means of what all clients reported."""
    names = set.intersection(*(set(m) for m in log.metrics.values()))
    weight = sum(log.weights.values())
    means = {name: sum(log.weights[c] * m[name] for c, m in log.metrics.items()) / weight for name in sorted(names)}
    return {**means, "num-examples": float(weight)}
