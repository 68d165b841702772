"""Runs the programs of a simulation to their end: starts a fallen coordinator again, stops everything cleanly."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from fedtune.cli.complaints import Complaints
from fedtune.cli.programs import Program
from fedtune.cli.remote import fetch_status, running_address
from fedtune.cli.view import RunView
from fedtune.config.schema import ClientConfig
from fedtune.errors import FedtuneError, RoundError, UnavailableError, problem
from fedtune.report.events import Event, Tail

_READY_S = 120.0
_FAREWELL_S = 30.0
_LOOK_S = 0.2
_PROGRESS_S = 1.0
_RESTARTS = 5
_BY_CODE = {kind.exit_code: kind for kind in FedtuneError.__subclasses__()}


class Supervisor:
    """The coordinator and the clients of one simulation.

    Args:
        folder: the run folder.
        coordinator: the coordinator's program.
        host: the clients' program.
        view: what is shown.
        on_round: told of every round that closes, by its number and digest, those of an earlier start included.
    """

    def __init__(
        self,
        folder: Path,
        coordinator: Program,
        host: Program,
        view: RunView,
        on_round: Callable[[int, str], None],
    ) -> None:
        self._folder, self._coordinator, self._host = folder, coordinator, host
        self._view, self._on_round = view, on_round
        self._tail = Tail(folder / "events.jsonl", from_end=True)
        self._complaints = Complaints(host.log)
        self._restarts = 0
        self._asked_s = 0.0
        self._finished = False
        self._ready = False

    def run(self) -> None:
        """Returns when the run is complete.

        Raises:
            FedtuneError: a program ended with that error, or kept dying.
            KeyboardInterrupt: Ctrl-C or SIGTERM; the programs have been stopped, and the run can be continued.
        """
        with _sigterm_interrupts(), self._view.shown():
            try:
                self._coordinator.start()
                self._wait_ready()
                if not self._over():
                    self._host.start()
                    self._watch()
                    self._host.wait(_FAREWELL_S)
            finally:
                self._host.stop()
                self._coordinator.stop()
                self._look()

    def _watch(self) -> None:
        while not self._over():
            self._progress()
            if self._coordinator.code is not None and not self._over():
                self._revive()
            elif self._host.code is not None and not self._finished:
                self._clients_ended()
            time.sleep(_LOOK_S)

    def _over(self) -> bool:
        """Whether the coordinator has ended because every round is closed."""
        ended = self._coordinator.code == 0
        self._look()  # after the code: what it wrote last must have been read
        return ended and (self._finished or not self._ready)

    def _wait_ready(self) -> None:
        """Waits until the coordinator listens or has ended; raises the error it named, if it named one."""
        until = time.monotonic() + _READY_S
        while not self._ready and self._coordinator.code is None:
            if time.monotonic() > until:
                raise UnavailableError(problem("coordinator", f"ready within {_READY_S:g} s", "silence", self._see()))
            time.sleep(0.05)
            self._look()
        if self._coordinator.code and not self._coordinator.crashed:
            raise self._error(self._coordinator)

    def _revive(self) -> None:
        """Starts the coordinator again: it continues the same run. An error it named is not mended by that."""
        code = self._coordinator.code
        if code and not self._coordinator.crashed:
            raise self._error(self._coordinator)
        self._restarts += 1
        if self._restarts > _RESTARTS:
            said = f"exit code {code}: {self._coordinator.last_words()}"
            raise RoundError(problem("coordinator", f"at most {_RESTARTS} restarts", said, self._see()))
        self._view.note(f"the coordinator ended (code {code}); starting it again, the run continues")
        self._ready = False
        self._coordinator.start()
        self._wait_ready()

    def _clients_ended(self) -> None:
        """All clients are gone and the run is not over: start them again if they were killed, else give up."""
        code = self._host.code
        self._coordinator.wait(2.0)
        if self._over() or self._coordinator.code is not None:
            return
        self._restarts += 1
        if code and (not self._host.crashed or self._restarts > _RESTARTS):
            raise self._error(self._host)
        self._view.note(f"the clients ended (code {code}); starting them again")
        self._host.start()

    def _look(self) -> None:
        for event in self._tail.read():
            self._take(event)
        for complaint in self._complaints.read():
            self._view.note(f"failed: {complaint}")

    def _take(self, event: Event) -> None:
        self._view.tell(event)
        kind = event["event"]
        if kind == "ready":
            self._ready = True
        elif kind == "round_closed":
            self._on_round(int(event["round"]), str(event["digest"]))
        elif kind == "run_finished":
            self._finished = True

    def _progress(self) -> None:
        """Asks for the clients' steps now and then; only for people, so no answer is no error."""
        address = running_address(self._folder)
        if address is None or time.monotonic() - self._asked_s < _PROGRESS_S:
            return
        self._asked_s = time.monotonic()
        try:
            self._view.progress(fetch_status(ClientConfig(address=address), timeout_s=0.5))
        except FedtuneError:
            return

    def _error(self, program: Program) -> FedtuneError:
        """The error that a program ended with, in its own words."""
        kind = _BY_CODE.get(program.code or 1, RoundError)
        return kind(f"{program.name}: {program.last_words()}\n  log: {program.log}")

    def _see(self) -> str:
        return f"See {self._coordinator.log}"


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Treats SIGTERM like Ctrl-C, so that a scheduler that ends us leaves a run that can be continued."""

    def handle(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
