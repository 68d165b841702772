"""Which packages for training are installed; looked up without importing them."""

from importlib.util import find_spec

from fedtune.errors import ConfigError, problem

_TRAINING = ("torch", "transformers", "peft")


def need_training() -> None:
    """Raises ConfigError, naming what is missing, when the packages for training are not installed."""
    missing = [name for name in _TRAINING if find_spec(name) is None]
    if missing:
        got = f"no {' and no '.join(missing)}"
        raise ConfigError(problem("installation", ", ".join(_TRAINING), got, "pip install 'fedtune[client]'"))
