"""Every error fedtune raises on purpose, one tree.

    FedtuneError            something the user can mend; the command line prints it without a traceback
    ├── ConfigError         a configuration is wrong                                   exit code 2
    ├── DataError           training data is missing or malformed                      exit code 3
    ├── ModelError          the base model is missing, unsupported or not the same     exit code 4
    ├── WireError           a peer sent bytes that break the contract                  exit code 5
    ├── ProtocolError       two programs cannot talk: version, features, settings      exit code 6
    ├── RoundError          a run cannot go on: quorum never met, every attempt spent  exit code 7
    ├── StorageError        disk full, folder not writable, record damaged             exit code 8
    ├── UnavailableError    the other side cannot be reached (worth another try)       exit code 9
    └── TrainingError       training diverged, or changed nothing                      exit code 10

A message states the rule, the name and the value, then what to do: build it with `problem`.
"""

from typing import ClassVar


class FedtuneError(Exception):
    """The root: catch this to catch everything fedtune raises on purpose."""

    exit_code: ClassVar[int] = 1


class ConfigError(FedtuneError):
    """A configuration is wrong; the message lists every fault found, not only the first."""

    exit_code = 2


class DataError(FedtuneError):
    """Training data is missing, empty or malformed."""

    exit_code = 3


class ModelError(FedtuneError):
    """The base model is missing, unsupported, or differs from the one the run was started with."""

    exit_code = 4


class WireError(FedtuneError):
    """A peer sent bytes that break the contract; they were refused and changed nothing."""

    exit_code = 5


class ProtocolError(FedtuneError):
    """Two programs cannot talk to each other: protocol version, features or settings differ."""

    exit_code = 6


class RoundError(FedtuneError):
    """A run cannot go on: a round missed its quorum in every attempt, or nothing is left to train on."""

    exit_code = 7


class StorageError(FedtuneError):
    """The run folder cannot be used: the disk is full, it is not writable, or a record is damaged."""

    exit_code = 8


class UnavailableError(FedtuneError):
    """The other side cannot be reached now; another try later may succeed."""

    exit_code = 9


class TrainingError(FedtuneError):
    """Training gave nothing worth sending: the loss is not finite, or the weights did not change."""

    exit_code = 10


def problem(name: str, want: object, got: object, remedy: str = "") -> str:
    """Builds an error message: what is wrong with `name`, and what to do about it."""
    return f"{name}: expected {want}, got {got}" + (f". {remedy}" if remedy else "")
