"""The plug-in's own keys in a run config, `flower.*`. Only the standard library is imported: a ClientApp reads them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

from fedtune.errors import ConfigError, problem

_CHOICES = ("auto", "on", "off")


@dataclass(frozen=True, slots=True)
class Plugin:
    """How nodes are run inside Flower.

    Attributes:
        resident: whether a worker that keeps the model does a node's work: `on`, `off`, or `auto`: in a deployment.
        idle_s: seconds after which a resident worker that nobody asks ends.
        keep: in a simulation, the number of nodes whose model an actor keeps in memory.
    """

    resident: str = "auto"
    idle_s: float = 900.0
    keep: int = 1

    def __post_init__(self) -> None:
        if self.resident not in _CHOICES:
            raise ConfigError(problem("flower.resident", " or ".join(_CHOICES), repr(self.resident)))
        if not _is_number(self.idle_s) or not 0 < self.idle_s < math.inf:
            raise ConfigError(problem("flower.idle_s", "seconds, more than 0", repr(self.idle_s)))
        if not _is_number(self.keep) or self.keep != int(self.keep) or self.keep < 1:
            raise ConfigError(problem("flower.keep", "a whole number from 1 on", repr(self.keep)))

    @classmethod
    def read(cls, run_config: Mapping[str, object]) -> "Plugin":
        """Reads a run config; an empty text leaves the default. Raises ConfigError on a wrong key or value."""
        given = {k[7:]: v for k, v in run_config.items() if k.startswith("flower.") and v != ""}
        known = [field.name for field in fields(cls)]
        if strange := sorted(given.keys() - set(known)):
            raise ConfigError(
                problem("--run-config", " or ".join(f"flower.{k}" for k in known), f"flower.{strange[0]}")
            )
        return cls(**given)  # type: ignore[arg-type]  # checked by __post_init__


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
