"""Keys of `[training]` and of codecs that were set although the method, or the codec, has no use for them."""

from dataclasses import fields

from fedtune.config.schema import Config, TrainingConfig
from fedtune.method import links


def unused(config: Config) -> str:
    """Says which of those keys are not as by default but have no effect; empty when there are none.

    A configuration may keep them: it serves several methods and codecs.
    """
    return "; ".join([*_training(config), *_codecs(config)])


def _training(config: Config) -> list[str]:
    usual, method = TrainingConfig(), config.method
    names = [field.name for field in fields(TrainingConfig) if field.name in method.unused]
    found = [name for name in names if getattr(config.training, name) != getattr(usual, name)]
    said = f"{', '.join(f'training.{name}' for name in found)}: not used by {method.name}; see its own in [method]"
    return [said] if found else []


def _codecs(config: Config) -> list[str]:
    said = []
    for key, link in links(config.method).items():
        beside = "beside budget_kb" if link.idle == ["density"] and link.budget_kb else f"by codec {link.codec}"
        if link.idle:
            said.append(f"{', '.join(f'method.{key}.{name}' for name in link.idle)}: not used {beside}")
    return said
