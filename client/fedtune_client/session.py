"""The client's conversation with the coordinator: Hello, Welcome, Ready, then tasks until the run is finished.

The connection may break at any moment, and the coordinator may be gone for days: the session dials again, with
jitter, and training goes on meanwhile.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TypeAlias

import grpc

from fedtune import __version__, wire
from fedtune.capability import Capability
from fedtune.config import Config, Shared
from fedtune.errors import ConfigError, ModelError, ProtocolError, RoundError, UnavailableError, problem
from fedtune.method import Member
from fedtune.wire.convert import capability_to_proto
from fedtune.wire.v1 import coordinator_pb2 as pb
from fedtune.worker import OnStep, Worker
from fedtune_client.channel import is_loopback, open_channel
from fedtune_client.log import Log
from fedtune_client.outbox import Outbox
from fedtune_client.retry import CAP_LOOPBACK_S, CAP_S, Backoff, error_of
from fedtune_client.transfer import Transfer
from fedtune_client.turns import Abandoned, Gate, Terms, Turns

Say: TypeAlias = "queue.SimpleQueue[pb.ClientMessage | None]"
OpenWorker: TypeAlias = Callable[[Config, Shared, int | None, OnStep | None], Worker]

PROGRESS_S, SAY_S = 1.0, 30.0
_STEP_S = 30.0


class Session:
    """One client's part in one run. `run` may be called once."""

    def __init__(self, config: Config, index: int | None, open_worker: OpenWorker, gate: Gate, log: Log) -> None:
        self._config, self._index, self._open_worker, self._gate, self._log = config, index, open_worker, gate, log
        self._client = config.client
        self._cap_s = CAP_LOOPBACK_S if is_loopback(config.client.address) else CAP_S
        self._channel = open_channel(config.client)
        self._outbox = Outbox(config.client.folder)
        self._ended = threading.Event()
        self._error: BaseException | None = None
        self._call: grpc.Call | None = None
        self._say: Say | None = None
        self._terms: Terms | None = None
        self._ready = pb.Ready()
        self._turns: Turns | None = None
        self._reported_s = self._said_s = 0.0
        self._lost_s: float | None = None

    def run(self) -> bool:
        """Works until the run is finished or `stop` is called; returns whether the run was completed.

        Raises:
            FedtuneError: this client cannot take part, or the run failed; another try would not help.
        """
        try:
            finished = self._stay()
        finally:
            if self._turns and not self._ended.is_set():
                self._turns.end(_STEP_S)
            self._ended.set()
            self._channel.close()
        if self._error:
            raise self._error
        if finished:
            self._outbox.clear()
        if finished and finished.outcome != pb.OUTCOME_COMPLETED:
            raise RoundError(finished.message or "the run failed")
        return finished is not None

    def stop(self) -> None:
        """Ends the session from another thread; unfinished work is left, finished work is on disk."""
        self._ended.set()
        if self._turns:
            self._turns.end(0.0)
        if self._call:
            self._call.cancel()
        self._channel.close()

    def training(self) -> bool:
        """Whether the training thread is still at work, which it may be for one more step after the end."""
        return self._turns is not None and not self._turns.end(0.0)

    def _stay(self) -> pb.Finished | None:
        """Keeps a connection until the run is finished."""
        backoff = Backoff(self._cap_s)
        while not self._ended.is_set():
            began_s = time.monotonic()
            try:
                finished = self._connect()
                if finished:
                    return finished
                reason = "the coordinator ended the connection"
            except UnavailableError as error:
                reason = str(error)
            if time.monotonic() - began_s > self._cap_s:
                backoff.reset()
            self._lost(reason)
            self._ended.wait(backoff.next_s())
        return None

    def _connect(self) -> pb.Finished | None:
        """Dials once and listens until the stream ends; returns the coordinator's last word, if it was said.

        Raises:
            UnavailableError: the connection failed or broke.
            ProtocolError: another program joined under this client's id.
        """
        say: Say = queue.SimpleQueue()
        join = self._channel.stream_stream(
            wire.JOIN,
            request_serializer=pb.ClientMessage.SerializeToString,
            response_deserializer=pb.ServerMessage.FromString,
        )
        say.put(pb.ClientMessage(hello=self._hello()))
        try:
            self._call = call = join(_until_none(say))
            if self._ended.is_set():
                call.cancel()
            return self._listen(call, say)
        except grpc.RpcError as error:
            if isinstance(error, grpc.Call) and error.code() is grpc.StatusCode.ABORTED:
                raise ProtocolError(str(error_of(error))) from error  # another program goes by this client's id
            raise error_of(error) from error
        except ValueError:
            if self._ended.is_set():  # grpc's word for a channel that was closed by `stop`
                return None
            raise
        finally:
            self._say = None
            say.put(None)
            if self._call:
                self._call.cancel()

    def _listen(self, call: Iterable[pb.ServerMessage], say: Say) -> pb.Finished | None:
        """Answers what the coordinator says, message after message."""
        for message in call:
            if message.HasField("welcome"):
                say.put(pb.ClientMessage(ready=self._welcomed(message.welcome)))
                self._say = say
                self._joined()
            elif message.HasField("task") and self._turns:
                self._turns.give(message.task)
            elif message.HasField("finished"):
                return message.finished
        return None

    def _hello(self) -> pb.Hello:
        return pb.Hello(
            protocol_major=wire.PROTOCOL_MAJOR,
            protocol_minor=wire.PROTOCOL_MINOR,
            software=f"fedtune {__version__}",
            features=wire.FEATURES,
            client_id=self._client.id,
            run_id=self._terms.run_id if self._terms else "",
            rank=self._client.rank,
            alpha=self._client.alpha,
            depth=self._client.depth,
        )

    def _welcomed(self, welcome: pb.Welcome) -> pb.Ready:
        """Checks the coordinator's terms and, the first time, opens the model and the data."""
        terms = _terms(welcome, self._client.id)
        if self._terms is None:
            self._ready = self._begin(terms)
            self._terms = terms
        elif terms != self._terms:
            name = "run" if terms.run_id != self._terms.run_id else "settings"
            remedy = "Start this client again to take part in the new run"
            raise ProtocolError(problem(name, f"those of run {self._terms.run_id}", f"run {terms.run_id}", remedy))
        return self._ready

    def _begin(self, terms: Terms) -> pb.Ready:
        worker = self._open_worker(self._config, self._with_own_model(terms.shared), self._index, self._on_step)
        if worker.base_digest != terms.base_digest:
            remedy = (
                f"The run is for {terms.shared.model.name}; see that the files are the same on every machine, also "
                "where this client's own model.name says that they are"
            )
            raise ModelError(problem("base model: digest", terms.base_digest, worker.base_digest, remedy))
        able = self._measured(worker, terms)
        self._turns = Turns(
            terms,
            worker,
            Transfer(self._channel, self._client.id, self._client.folder),
            self._outbox,
            self._log,
            gate=self._gate,
            cap_s=self._cap_s,
            failed=self._fail,
        )
        digest = terms.shared.digest()
        ready = pb.Ready(settings_digest=digest, base_digest=worker.base_digest, examples=worker.examples)
        if able is not None:
            ready.capability.CopyFrom(capability_to_proto(able))
        return ready

    def _measured(self, worker: Worker, terms: Terms) -> Capability | None:
        """What this machine can do, if it is to say so; the clients of one machine measure one after another."""
        if not (self._client.measure and terms.shared.method.takes_depth):
            return None
        with self._gate():
            able = worker.measure(terms.shared.method, terms.member)
        self._log.event("measured", "measured what this machine can do", **asdict(able))
        return able

    def _with_own_model(self, shared: Shared) -> Shared:
        """Puts this machine's copy of the model, if its own `model.name` is a folder, in place of the shared name."""
        name, own = self._config.model.name, Path(self._config.model.name).expanduser()
        if not (own / "config.json").is_file():
            if name.startswith(("/", "./", "../", "~")) and name != shared.model.name:
                remedy = f"Correct it in this client's file, or leave it out: the run's model is {shared.model.name}"
                raise ModelError(problem("model.name", "a folder with config.json, as it is a path", name, remedy))
            return shared
        return replace(shared, model=replace(shared.model, name=str(own), revision=""))

    def _fail(self, error: BaseException) -> None:
        """Takes an error that ended the training thread."""
        if not self._ended.is_set():
            self._error = error
        self.stop()

    def _on_step(self, step: int, steps: int, loss: float) -> None:
        """Reports progress about once a second, says it twice a minute, and ends a training that nobody waits for."""
        turns = self._turns
        if turns is None or turns.stale:
            raise Abandoned
        say, now = self._say, time.monotonic()
        if step == 1:
            self._said_s = now
        if now - self._said_s >= SAY_S:
            self._said_s = now
            self._log.event("step", f"round {turns.round}: step {step}/{steps}, loss {loss:.4f}", round=turns.round)
        if say and (step in (1, steps) or now - self._reported_s >= PROGRESS_S):
            self._reported_s = now
            say.put(pb.ClientMessage(progress=pb.Progress(round=turns.round, step=step, steps=steps, loss=loss)))

    def _joined(self) -> None:
        text = f"joined {self._client.address}"
        if self._lost_s is not None:
            text = f"{text} after {time.monotonic() - self._lost_s:.1f} s"
        self._lost_s = None
        self._log.event("joined", text)

    def _lost(self, reason: str) -> None:
        """Says once that there is no connection."""
        if self._lost_s is None and not self._ended.is_set():
            self._lost_s = time.monotonic()
            text = f"no connection to {self._client.address} ({reason}); trying until there is one"
            self._log.event("disconnected", text, reason=reason)


def _until_none(messages: Say) -> Iterator[pb.ClientMessage]:
    while (message := messages.get()) is not None:
        yield message


def _terms(welcome: pb.Welcome, client_id: str) -> Terms:
    """Reads a welcome; raises ProtocolError when this program cannot keep to it."""
    if welcome.protocol_major != wire.PROTOCOL_MAJOR:
        remedy = "Install the same version of fedtune on both sides"
        raise ProtocolError(problem("protocol version", wire.PROTOCOL_MAJOR, welcome.protocol_major, remedy))
    missing = sorted(set(wire.FEATURES) - set(welcome.features))
    if missing:
        raise ProtocolError(problem("features of the coordinator", ", ".join(wire.FEATURES), f"no {missing[0]}"))
    try:
        shared = Shared.from_json(welcome.settings_json)
    except (ConfigError, ValueError) as error:
        raise ProtocolError(f"{error}. Install the same version of fedtune on both sides") from error
    if shared.digest() != welcome.settings_digest:
        remedy = "Install the same version of fedtune on both sides"
        raise ProtocolError(problem("settings digest", welcome.settings_digest, shared.digest(), remedy))
    return Terms(welcome.run_id, shared, welcome.base_digest, Member(client_id, welcome.rank, welcome.alpha))


__all__ = ["OpenWorker", "Session"]
