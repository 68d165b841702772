"""Models of the Hugging Face hub, fetched without torch, and what a hub that cannot be reached looks like.

`huggingface_hub` is imported only when something is to be fetched: most runs never need a network.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedtune.errors import ModelError, UnavailableError, problem
from fedtune.locate import BUILT_IN, locate_model, model_folder

PATIENCE_S = 5.0
"""Seconds in which the hub must give a sign of life before anything is asked of it."""

_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+|gpt2")
# Base classes of what HTTP libraries raise when there is no connection, by name: which library it is differs.
_NO_CONNECTION = {"ConnectionError", "TimeoutError", "Timeout", "TransportError", "OfflineModeIsEnabled"}


def find_model(name: str, revision: str = "") -> Path:
    """Returns the folder of a model: the one this machine holds, else fetched from the hub.

    Args:
        name: a local folder, a hub id, or a built-in model that was made here before.
        revision: commit, branch or tag of a hub id; empty means main.

    Raises:
        ModelError: there is no such model, or what fetches it is not installed.
        UnavailableError: the hub cannot be reached.
    """
    try:
        return locate_model(name, revision)
    except ModelError:
        if name in BUILT_IN:
            remedy = (
                "It is made with torch: pip install 'fedtune[client]', or run `fedtune doctor --fetch CONFIG` on a "
                "machine that has torch and copy the folder from there"
            )
            raise ModelError(
                problem(f"model.name {name!r}", f"the folder {model_folder(name)}", "none", remedy)
            ) from None
        if not _HUB_ID.fullmatch(name) or Path(name).expanduser().exists():
            want = "a model folder, a hub id or a built-in model"
            raise ModelError(problem("model.name", want, repr(name), _choices())) from None
    return _fetch(name, revision)


def hub_answers() -> bool:
    """Whether the hub can be reached within `PATIENCE_S` seconds; any answer will do, also one that refuses."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=PATIENCE_S)
    except Exception as error:
        if no_connection(error):
            return False
        raise
    return True


def no_connection(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, says that there was no connection."""
    while error is not None:
        if _NO_CONNECTION & {kind.__name__ for kind in type(error).__mro__}:
            return True
        error = error.__cause__ or error.__context__
    return False


def unreachable(name: str, remedy: str) -> UnavailableError:
    """Builds the error for a hub that does not answer.

    Args:
        name: the key and its value.
        remedy: what to name instead.
    """
    from huggingface_hub import constants

    want = f"a model or data set that is here, or a hub that answers ({constants.ENDPOINT})"
    return UnavailableError(problem(name, want, "no connection", remedy))


@contextmanager
def offline(*modules: object) -> Iterator[None]:
    """Tells the hub's client, and other modules with the same switch, to use only what is on this disk."""
    from huggingface_hub import constants

    switched = [(module, vars(module)["HF_HUB_OFFLINE"]) for module in (constants, *modules)]
    try:
        for module, _ in switched:
            setattr(module, "HF_HUB_OFFLINE", True)  # noqa: B010  # the type of a module has no such attribute
        yield
    finally:
        for module, before in switched:
            setattr(module, "HF_HUB_OFFLINE", before)  # noqa: B010  # likewise


def _fetch(name: str, revision: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        want, remedy = "huggingface_hub, which fetches it", f"pip install huggingface_hub. {_choices()}"
        raise ModelError(problem(f"model.name {name!r}", want, "not installed", remedy)) from error
    key = f"model.name {name!r}"
    try:
        if not hub_answers():
            raise unreachable(key, _choices())
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=_PATTERNS))
    except UnavailableError:
        raise
    except Exception as error:  # the hub's client raises its own, its HTTP library's and the system's errors
        if no_connection(error):
            raise unreachable(key, _choices()) from error
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(problem(key, "a model folder, or a model that the hub serves", said, _choices())) from error


def _choices() -> str:
    return f"Without a hub: name a local folder, or a built-in model ({', '.join(BUILT_IN)})"
