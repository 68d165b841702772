"""What a runtime needs of a client's model: `fedtune.training.worker` has it with torch, `testing` without."""

from collections.abc import Callable
from typing import Protocol

from fedtune.capability import Capability
from fedtune.method import ClientJob, Member, Method

OnStep = Callable[[int, int, float], None]
"""Called after each optimiser step with its number, the number of steps, and the loss. It may raise to end training."""


class Worker(Protocol):
    """A client's base model with its local data.

    `base_digest` is the SHA-256 of the base weights, `examples` the number of rows to train on, and `metrics` what
    the last training gave: at most 32 numbers such as `loss` and `steps`.
    """

    base_digest: str
    examples: int
    metrics: dict[str, float]

    def reset(self) -> None:
        """Puts the weights back to the base, with nothing merged or attached."""

    def measure(self, method: Method, member: Member) -> Capability:
        """Finds out what this client can do in a run of `method`, admitted as `member`, with a few steps of training.

        It is called before anything is installed, and leaves the worker as it was.
        """

    def job(self, method: Method, member: Member, round_number: int) -> ClientJob:
        """Starts the client's turn in one round."""
