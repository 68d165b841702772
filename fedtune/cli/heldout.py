"""Held-out figures while a run goes on: the base first, then each round's adapter as it closes, in a thread."""

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from fedtune.config import Config
from fedtune.report.evaluations import BASE, Evaluations

OnFigures = Callable[[int, dict[str, float]], None]


@dataclass(frozen=True, slots=True)
class _Job:
    """One thing to measure: round 0 is the base, which has no adapter."""

    number: int
    digest: str
    adapter: Path | None


class HeldOut:
    """Measures what it is given, in order, and keeps the figures in the run folder.

    Args:
        config: says what model, and which rows are held out.
        on_figures: told of each result by round number, 0 for the base, from another thread.
    """

    def __init__(self, config: Config, on_figures: OnFigures) -> None:
        config.run.folder.mkdir(parents=True, exist_ok=True)
        self.evaluations = Evaluations.open(config.run.folder, config)
        self.error: Exception | None = None
        threads = config.client.threads or config.simulation.threads
        self._config = replace(config, client=replace(config.client, threads=threads))
        self._on_figures = on_figures
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="held-out", daemon=True)

    def start(self) -> None:
        """Begins with the base."""
        self._jobs.put(_Job(0, BASE, None))
        self._thread.start()

    def add(self, number: int, digest: str, adapter: Path) -> None:
        """Adds a closed round."""
        self._jobs.put(_Job(number, digest, adapter))

    def finish(self) -> None:
        """Waits for what is left; what ended the measuring too early is in `error`."""
        self._jobs.put(None)
        while self._thread.is_alive():
            self._thread.join(0.2)

    def _work(self) -> None:
        from fedtune.training.evaluate import Evaluator

        evaluator: Evaluator | None = None
        try:
            while (job := self._jobs.get()) is not None:
                figures = self.evaluations.get(job.digest)
                if figures is None:
                    evaluator = evaluator or Evaluator.open(self._config)
                    figures = evaluator.base() if job.adapter is None else evaluator.adapter(job.adapter)
                    self.evaluations.put(job.digest, figures)
                self._on_figures(job.number, figures)
        except Exception as error:  # whatever it is, the run must not end as if it had its figures
            self.error = error
