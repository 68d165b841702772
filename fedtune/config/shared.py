"""The part of a configuration that coordinator and clients must share, as canonical JSON with a digest."""

import hashlib
import json
from dataclasses import asdict, dataclass

from fedtune.config.load import parse
from fedtune.config.schema import Config, ModelConfig, TrainingConfig
from fedtune.method import Method


@dataclass(frozen=True, slots=True)
class Shared:
    """Method, training, model and seed: a client takes them from the coordinator's welcome, never from its own file."""

    method: Method
    training: TrainingConfig
    model: ModelConfig
    seed: int

    @classmethod
    def of(cls, config: Config) -> "Shared":
        """Picks the shared part."""
        return cls(config.method, config.training, config.model, config.run.seed)

    @classmethod
    def from_json(cls, text: str) -> "Shared":
        """Reads what `to_json` wrote; raises ConfigError for an unknown key, as an older peer would meet."""
        raw = json.loads(text)
        seed = raw.pop("seed", 0)
        config = parse({**raw, "run": {"seed": seed}}, "settings from the coordinator", whole=False)
        return cls.of(config)

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, every field present."""
        # asdict() of a pydantic dataclass is plain data; the model's local path is not shared, only its name.
        sections = {
            "method": {"name": self.method.name, **asdict(self.method)},  # type: ignore[call-overload]  # methods are dataclasses
            "training": asdict(self.training),
            "model": asdict(self.model),
            "seed": self.seed,
        }
        return json.dumps(sections, sort_keys=True, separators=(",", ":"))

    def digest(self) -> str:
        """SHA-256 of the canonical JSON (64 hex digits)."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()
