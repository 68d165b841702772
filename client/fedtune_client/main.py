"""`run`: one client from its configuration to its exit code."""

import fcntl
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import FrameType

from fedtune.config import Config, Shared
from fedtune.errors import ConfigError, FedtuneError, StorageError, problem
from fedtune.installed import need_training
from fedtune.worker import OnStep, Worker
from fedtune_client.log import Log
from fedtune_client.session import OpenWorker, Session
from fedtune_client.turns import Gate


def run(
    config: Config, index: int | None = None, open_worker: OpenWorker | None = None, gate: Gate | None = None
) -> int:
    """Takes part in the run at `config.client.address` until it is finished.

    Called in the main thread it answers SIGTERM and SIGINT by leaving with exit code 0 within about two seconds.

    Args:
        config: of this client; method, training and model come from the coordinator.
        index: part of a partitioned data set that is this client's; None means all of the data it has.
        open_worker: opens model and data; the torch worker when None.
        gate: makes a context manager that is entered while the model computes.

    Returns:
        The exit code: 0 when the run was completed or this client was told to stop, else that of the error.
    """
    try:
        if open_worker is None:
            need_training()
        log = Log(config.client.folder, config.client.id)
    except FedtuneError as error:
        sys.stderr.write(f"{config.client.id}: error: {error}\n")
        return error.exit_code
    try:
        with _alone(config):
            return _serve(Session(config, index, open_worker or open_torch, gate or nullcontext, log), log)
    except FedtuneError as error:
        log.event("failed", f"error: {error}", error=type(error).__name__)
        return error.exit_code
    except Exception as error:
        log.crash(error)
        return FedtuneError.exit_code
    finally:
        log.close()


def open_torch(config: Config, shared: Shared, index: int | None, on_step: OnStep | None) -> Worker:
    """Opens the torch worker; torch is imported only now."""
    from fedtune.training.worker import TorchWorker

    return TorchWorker.open(config, shared, index, on_step)


def _serve(session: Session, log: Log) -> int:
    """Runs the session; in the main thread beside the signals."""
    in_main = threading.current_thread() is threading.main_thread()
    completed = _beside_signals(session, log) if in_main else session.run()
    log.event(*(("finished", "the run is complete") if completed else ("stopped", "stopped")))
    return 0


def _beside_signals(session: Session, log: Log) -> bool:
    """Runs the session in a thread while this one waits for it or for a signal; returns whether the run completed.

    The handler only writes a byte: it may interrupt any instruction, so it must not touch a lock.
    """
    outcome: list[bool | BaseException] = []
    readable, writable = os.pipe()

    def work() -> None:
        try:
            outcome.append(session.run())
        except BaseException as error:
            outcome.append(error)
        os.write(writable, b"e")

    with _handlers(writable):
        thread = threading.Thread(target=work, name="fedtune-session", daemon=True)
        thread.start()
        if os.read(readable, 1) == b"s":
            _stop(session, thread, log)
            return False
    result = outcome[0]
    if isinstance(result, BaseException):
        raise result
    return result


def _stop(session: Session, thread: threading.Thread, log: Log) -> None:
    """Ends the session; leaves the process at once when a thread is deep in training or in loading the model.

    Nothing interrupts such a thread from outside, and Python must not be torn down under it. What matters is on disk.
    """
    session.stop()
    thread.join(2.0)
    if thread.is_alive() or session.training():
        log.event("stopped", "stopped")
        log.close()
        os._exit(0)


@contextmanager
def _handlers(writable: int) -> Iterator[None]:
    def handle(number: int, frame: FrameType | None) -> None:
        os.write(writable, b"s")

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _alone(config: Config) -> Iterator[None]:
    """Holds the client's folder: two clients in one would mix up their updates."""
    folder = config.client.folder
    try:
        stream = (folder / "lock").open("a")
    except OSError as error:
        raise StorageError(problem("client.folder", "a writable folder", f"{folder} ({error.strerror})")) from error
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            remedy = "Another client is running in it"
            raise ConfigError(problem("client.folder", "a folder of its own", folder, remedy)) from error
        yield
