"""`evaluations.json`: held-out figures of the base and of each round, kept so that a resumed run does not repeat them.

A figure is filed under what it was measured on: `key` is a digest of the model, the data settings and the seed, and
each round's entry carries the digest of its state. Anything that differs is measured again.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fedtune.config import Config
from fedtune.report.folder import replace_text

BASE = "base"
Figures = dict[str, float]


@dataclass
class Evaluations:
    """Held-out figures by what was measured: `base`, or the digest of a state."""

    path: Path
    key: str
    figures: dict[str, Figures] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path, config: Config) -> "Evaluations":
        """Reads what a run folder holds for this model, data and seed; starts empty when there is nothing."""
        key, stored = _key(config), cls.stored(folder)
        return stored if stored and stored.key == key else cls(folder / "evaluations.json", key)

    @classmethod
    def stored(cls, folder: Path) -> "Evaluations | None":
        """Reads what a run folder holds, whatever it was measured on; None when there is nothing."""
        path = folder / "evaluations.json"
        try:
            stored = json.loads(path.read_text())
            return cls(path, str(stored["key"]), dict(stored["figures"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def get(self, what: str) -> Figures | None:
        """Returns the figures of `base` or of a state's digest, when they are known."""
        return self.figures.get(what)

    def put(self, what: str, figures: Figures) -> None:
        """Adds figures and writes the file, replacing it at once; raises StorageError when the disk refuses."""
        self.figures[what] = figures
        replace_text(self.path, json.dumps({"key": self.key, "figures": self.figures}, indent=2) + "\n")


def _key(config: Config) -> str:
    sections = [asdict(config.model), asdict(config.data), config.training.max_length, config.run.seed]
    return hashlib.sha256(json.dumps(sections, sort_keys=True, default=str).encode()).hexdigest()
