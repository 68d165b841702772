"""When to try again, and after how long."""

import random
from dataclasses import dataclass, field

import grpc

from fedtune.errors import FedtuneError
from fedtune.wire import status

FIRST_S = 0.1
CAP_LOOPBACK_S = 5.0
CAP_S = 30.0


@dataclass
class Backoff:
    """Full jitter: a wait drawn from [0, limit), where the limit doubles from `first_s` up to `cap_s`.

    Clients that lost the same coordinator at the same moment come back spread over time.
    """

    cap_s: float
    first_s: float = FIRST_S
    rng: random.Random = field(default_factory=random.Random)
    tries: int = 0

    def next_s(self) -> float:
        """Draws the next wait in seconds."""
        limit = min(self.cap_s, self.first_s * 2.0 ** min(self.tries, 30))
        self.tries += 1
        return self.rng.uniform(0.0, limit)

    def reset(self) -> None:
        """Starts from the shortest wait again."""
        self.tries = 0


def error_of(error: grpc.RpcError) -> FedtuneError:
    """Builds the error a failed call stands for; an UnavailableError is worth another try, all others are final."""
    if not isinstance(error, grpc.Call):
        return status.error_of(grpc.StatusCode.UNAVAILABLE, str(error))
    return status.error_of(error.code(), error.details(), error.trailing_metadata())
