"""One process of the coordinator: listens, drives the run, stops when it is over or when it is told to."""

import asyncio
import contextlib
import signal
import threading
import time
from collections.abc import Iterator

import grpc
import grpc.aio

from fedtune.errors import RoundError, StorageError
from fedtune_server import records
from fedtune_server.control import Control
from fedtune_server.engine import Engine
from fedtune_server.guard import DEFAULT_PATIENCE, Patience
from fedtune_server.ledger import write_atomically
from fedtune_server.listen import bind, parse_address, reachable
from fedtune_server.metrics import Metrics, Reading, serve_metrics
from fedtune_server.run import COMPLETED, Run
from fedtune_server.service import Health, build
from fedtune_server.transfer import Transfer

WATCH_S = 2.0
FAREWELL_S = 5.0
BLINK_S = 1.0
DRAIN_S = 5.0


class Coordinator:
    """Serves one run."""

    def __init__(self, run: Run, tls: grpc.ServerCredentials | None, patience: Patience = DEFAULT_PATIENCE) -> None:
        self._run, self._tls = run, tls
        self.metrics = Metrics()
        self.engine = Engine(run, self.metrics)
        self.control = Control(run, self.engine, patience)
        self._health = Health()
        self._server = build(run, self.control, Transfer(run, self.engine, patience), self._health)
        self._stop = asyncio.Event()
        self._was_over = bool(run.outcome)

    def stop(self) -> None:
        """Asks the process to drain and end."""
        self._stop.set()

    async def serve(self) -> None:
        """Returns when the run is complete or `stop` was called; raises RoundError when the run has failed."""
        self.engine.resume()
        try:
            address = await self._listen()
            with serve_metrics(self._run.config.server.metrics_address, self.metrics, self._reading), self._signals():
                self._run.events.emit("ready", address=address, run=self._run.run_id, round=self.engine.round_number)
                watch = asyncio.create_task(self._watch())
                try:
                    await self._drive()
                finally:
                    watch.cancel()
        finally:
            await self._end(0)

    async def _drive(self) -> None:
        """Runs the rounds until they end or the process is told to stop."""
        drive, stop = asyncio.create_task(self.engine.drive()), asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait([drive, stop], return_when=asyncio.FIRST_COMPLETED)
            if not drive.done():
                await self._drain()
                return
            failure = drive.exception()
            if failure is not None and not isinstance(failure, RoundError):
                raise failure
            await self._farewell("" if failure is None else str(failure))
            if failure is not None:
                raise failure
        finally:
            for task in (drive, stop):
                task.cancel()
            await asyncio.gather(drive, stop, return_exceptions=True)

    async def _listen(self) -> str:
        """Binds, starts and writes the `address` file; a port that was taken once is taken again after a restart."""
        host, port = parse_address(self._run.config.server.address)
        if port == 0:
            port = int(self._run.meta.get("port", "0"))
        port = bind(self._server, f"[{host}]:{port}" if ":" in host else f"{host}:{port}", self._tls)
        await asyncio.to_thread(self._run.set_meta, port=str(port))
        await self._server.start()
        await self._health.set(True)
        address = reachable(host, port)
        write_atomically(self._run.folder / "address", address + "\n")
        return address

    async def _farewell(self, message: str) -> None:
        """Tells the clients, waits a moment for those that are just coming back, and stops."""
        self.control.dismiss_all(message)
        self._run.events.emit("farewell", clients=sorted(self.engine.roster.sessions))
        end = time.monotonic() + FAREWELL_S
        # Who left a second ago is hardly coming back, unless this process was killed right before the farewell.
        return_s = FAREWELL_S if self._was_over else BLINK_S
        sessions = self.engine.roster.sessions
        while (sessions or self.control.untold(self.engine.cohort, return_s)) and time.monotonic() < end:
            await asyncio.sleep(0.02)
        if self._run.outcome == COMPLETED:
            await asyncio.to_thread(self._run.set_meta, dismissed="1")
        await self._end(BLINK_S)

    async def _drain(self) -> None:
        """Takes no new work, lets updates on their way finish, and stops."""
        self._run.events.emit("draining")
        await self._health.drain()
        self.control.drain()
        await self._end(DRAIN_S)

    async def _end(self, grace_s: float) -> None:
        """Stops listening; calls that have not ended after `grace_s` are cut off."""
        try:
            await asyncio.wait_for(self._server.stop(grace_s), grace_s + BLINK_S)
        except TimeoutError:
            self._run.events.emit("stop_overdue")

    async def _watch(self) -> None:
        """Records the ledger now and then, and tries whether a disk that was full takes writes again."""
        while True:
            await asyncio.sleep(WATCH_S)
            ledger = self._run.book.take()
            try:
                await self._run.store.commit(records.add_ledger(ledger))
                self._run.healthy = True
            except StorageError:
                self._run.book.give_back(ledger)
                self._run.healthy = False
            await self._health.set(self._run.healthy)

    def _reading(self) -> Reading:
        gauges = {
            "round": float(self.engine.round_number),
            "rounds": float(self._run.config.rounds.count),
            "clients_connected": float(len(self.engine.roster.sessions)),
            "clients_ready": float(len(self.engine.roster.ready())),
            "healthy": float(self._run.healthy),
        }
        return Reading(gauges, self._run.book.totals())

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT drain; outside the main thread signals are somebody else's."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)
