"""Keys of `[training]` that were set although the method has no use for them."""

from dataclasses import fields

from fedtune.config.schema import Config, TrainingConfig


def unused(config: Config) -> str:
    """Says which keys of `[training]` are not as by default but have no effect; empty when there are none.

    A configuration may keep them: it serves several methods.
    """
    usual, method = TrainingConfig(), config.method
    names = [field.name for field in fields(TrainingConfig) if field.name in method.unused]
    found = [name for name in names if getattr(config.training, name) != getattr(usual, name)]
    if not found:
        return ""
    return f"{', '.join(f'training.{name}' for name in found)}: not used by {method.name}; see its own in [method]"
