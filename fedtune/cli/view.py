"""What a person sees of a run while it goes on: a table that moves on a terminal, one line per happening elsewhere."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedtune.cli.console import duration, figure, size
from fedtune.cli.remote import RemoteStatus
from fedtune.report.events import Event
from fedtune.report.record import RoundRecord

_SHOWN_CLIENTS = 16
_SAID_CLIENTS = 4


@dataclass
class ClientView:
    """One client's line."""

    state: str = "starting"
    loss: float | None = None
    step: int = 0
    steps: int = 0
    skipped: int = 0


@dataclass
class RunView:
    """The run as far as it has been told. Plain, it prints a line for each happening worth one.

    Between them, while clients train, a plain view says at most every `every_s` seconds how far they are.
    """

    rounds: int
    console: Console
    plain: bool = False
    round: int = 0
    closed: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    waiting: str = ""
    clients: dict[str, ClientView] = field(default_factory=dict)
    held_out: dict[int, float] = field(default_factory=dict)
    train_loss: dict[int, float] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)
    every_s: float = 30.0
    said_s: float = field(default_factory=time.monotonic)

    def tell(self, event: Event) -> None:
        """Takes in one event of the coordinator."""
        text = self._take(event)
        if text:
            self._say(text)

    def closed_before(self, record: RoundRecord) -> None:
        """Takes in a round that an earlier start of the same run closed."""
        self.closed = self.round = record.round
        self.bytes_up += record.bytes_up
        self.bytes_down += record.bytes_down

    def evaluated(self, number: int, loss: float) -> None:
        """Takes in a held-out loss; round 0 is the base."""
        self.held_out[number] = loss
        if self.plain:
            what = f"round {number}" if number else "base model"
            self.console.print(f"{what}: held-out loss {loss:.4f}", markup=False)

    def note(self, text: str) -> None:
        """Says something that is not an event of the coordinator."""
        self.console.print(text, markup=False, soft_wrap=True)

    def progress(self, answer: RemoteStatus) -> None:
        """Takes in how far each client is within the round."""
        for remote in answer.clients:
            client = self.clients.setdefault(remote.id, ClientView())
            if remote.steps and remote.state == "training":
                client.step, client.steps, client.loss = remote.step, remote.steps, remote.loss
        at_work = [(name, c) for name, c in sorted(self.clients.items()) if c.state == "training" and c.steps]
        if at_work and time.monotonic() - self.said_s >= self.every_s:
            steps = [f"{name} step {c.step}/{c.steps}, loss {figure(c.loss, 3)}" for name, c in at_work[:_SAID_CLIENTS]]
            more = [f"{len(at_work) - _SAID_CLIENTS} more"] if len(at_work) > _SAID_CLIENTS else []
            self._say(f"round {self.round}/{self.rounds}: {'; '.join(steps + more)}")

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Keeps the table on the screen; does nothing when plain."""
        if self.plain:
            yield
            return
        with Live(get_renderable=self.render, console=self.console, refresh_per_second=4, transient=True):
            yield

    def render(self) -> RenderableType:
        """Draws the moving table."""
        waiting = [Text(self.waiting)] if self.waiting else []
        return Group(self._head(), *waiting, self._table(), self._history())

    def _say(self, text: str) -> None:
        self.said_s = time.monotonic()
        if self.plain:
            self.console.print(text, markup=False, soft_wrap=True)

    def _take(self, event: Event) -> str:
        """Applies an event; returns a line about it, or nothing."""
        client, number = str(event.get("client", "")), int(event.get("round", 0))
        match event["event"]:
            case "client_ready":
                self.clients[client] = ClientView("ready")
                return f"{client}: ready with {event.get('examples')} rows"
            case "client_left":
                self.clients.setdefault(client, ClientView()).state = "gone"
                return "" if self.closed == self.rounds else f"{client}: gone"
            case "round_started":
                self.round, self.waiting = number, ""
                again = f", attempt {event['attempt']}" if event.get("attempt", 1) > 1 else ""
                return f"round {number}/{self.rounds}: {len(event.get('selected', []))} clients{again}"
            case "task_pushed":
                self.clients.setdefault(client, ClientView()).state = "training"
            case "update_accepted":
                metrics = event.get("metrics", {})
                loss = metrics.get("loss")
                self.clients[client] = ClientView("done", loss, skipped=int(metrics.get("skipped", 0)))
                return f"{client}: update of {size(event.get('bytes', 0))}, loss {figure(loss)}"
            case "update_refused":
                return f"{client}: update refused: {event.get('reason')}"
            case "round_closed":
                return self._close(number, event)
            case "waiting":
                self.waiting = f"waiting for {event.get('clients')} clients, {event.get('ready')} are ready"
                return self.waiting
            case "round_failed":
                return f"round {number}: failed"
            case "storage_failed":
                return f"storage: {event.get('reason')}"
        return ""

    def _close(self, number: int, event: Event) -> str:
        self.closed = number
        self.bytes_up += int(event.get("bytes_up", 0))
        self.bytes_down += int(event.get("bytes_down", 0))
        losses = [c.loss for c in self.clients.values() if c.state == "done" and c.loss is not None]
        if losses:
            self.train_loss[number] = sum(losses) / len(losses)
        noted = "".join(f"; {note.replace('_', ' ')}: {', '.join(c)}" for note, c in event.get("notes", {}).items())
        skipped = sum(c.skipped for c in self.clients.values() if c.state == "done")
        left = f"; {skipped} steps skipped" if skipped else ""
        return f"round {number}/{self.rounds}: closed after {duration(event.get('seconds', 0))}{left}{noted}"

    def _head(self) -> RenderableType:
        done = sum(c.state == "done" for c in self.clients.values()) if self.round > self.closed else 0
        bar = ProgressBar(self.rounds, self.closed + done / max(1, len(self.clients)), width=30)
        traffic = f"{size(self.bytes_up)} up, {size(self.bytes_down)} down"
        text = f"round {self.round}/{self.rounds}   {traffic}   {duration(time.monotonic() - self.began)}"
        line = Table.grid(padding=(0, 2))
        line.add_row(bar, text)
        return line

    def _table(self) -> RenderableType:
        table = Table.grid(padding=(0, 2))
        for name, client in sorted(self.clients.items())[:_SHOWN_CLIENTS]:
            step = f"step {client.step}/{client.steps}" if client.state == "training" and client.steps else ""
            table.add_row(f"  {name}", client.state, step, f"loss {figure(client.loss, 3)}" if client.loss else "")
        hidden = len(self.clients) - _SHOWN_CLIENTS
        if hidden > 0:
            table.add_row(f"  and {hidden} more")
        return table

    def _history(self) -> RenderableType:
        shown = [f"{'base' if n == 0 else n}: {loss:.3f}" for n, loss in sorted(self.held_out.items())]
        return Text("held-out loss  " + "  ".join(shown) if shown else "", style="cyan")
