"""A run on disk: opened the same way whether it is new, was killed a moment ago, or ended last week."""

import fcntl
import json
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from fedtune.base import open_base
from fedtune.config import Config, Shared
from fedtune.config.compare import differences
from fedtune.errors import ConfigError, ModelError, problem
from fedtune.hub import find_model
from fedtune.method import BaseModel
from fedtune.report.folder import refuse_centralised
from fedtune.rounds import begin
from fedtune_server import records
from fedtune_server.blobs import Blobs, storage_error
from fedtune_server.events import Events
from fedtune_server.ledger import Book, write_atomically
from fedtune_server.store import Store
from fedtune_server.versions import Version, load_version, save_version

COMPLETED, FAILED = "completed", "failed"


@dataclass
class Run:
    """Everything the coordinator knows that outlives it.

    `outcome` is empty while the run goes on; `healthy` turns false while the disk refuses writes.
    """

    config: Config
    shared: Shared
    base: BaseModel
    store: Store
    blobs: Blobs
    events: Events
    book: Book
    version: Version
    run_id: str
    meta: dict[str, str]
    lock: IO[bytes]
    healthy: bool = True

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.config.run.folder

    @property
    def outcome(self) -> str:
        """`completed`, `failed`, or empty."""
        return self.meta.get("outcome", "")

    @property
    def complete(self) -> bool:
        """Whether every round of the configuration is closed."""
        return self.version.number >= self.config.rounds.count

    @property
    def over(self) -> bool:
        """Whether nothing is left to do: every round closed, results written, clients told."""
        return self.outcome == COMPLETED and self.meta.get("dismissed") == "1"

    def set_meta(self, **values: str) -> None:
        """Records settings durably; raises StorageError when the disk refuses."""
        self.store.call(records.write_meta(values))
        self.meta.update(values)

    def close(self) -> None:
        """Records the last bytes and lets go of the folder."""
        self.store.submit(records.add_ledger(self.book.take()))
        self.store.close()
        self.lock.close()


def open_run(config: Config) -> Run:
    """Opens or creates the run of `config.run.folder`; fetches its base model when that is of the hub and not here yet.

    Raises:
        ConfigError: the folder holds a run with other settings, or a centralised one, or is in use; or the method does
            not fit the base.
        ModelError: the base model is missing, or is not the one the run was started with.
        UnavailableError: the base model is to be fetched, and the hub cannot be reached.
        StorageError: the folder cannot be written, or what it holds is damaged.
    """
    folder = config.run.folder
    refuse_centralised(folder)
    lock = _lock(folder)
    shared = Shared.of(config)
    store = Store(folder / "run.db")
    meta = store.call(records.read_meta)
    _same_settings(shared, meta, folder)
    base = open_base(find_model(config.model.name, config.model.revision), config.model.name)
    _same_base(base, meta, folder)
    blobs = Blobs(folder / "blobs")
    if "run_id" not in meta:
        begin(shared.method, base, shared.seed)  # what it refuses leaves no record of a run
        meta = _create(shared, base, store, folder)
    version = _version(shared, base, store, blobs)
    book = Book(store.call(records.read_ledger))
    run = Run(config, shared, base, store, blobs, Events(folder), book, version, meta["run_id"], meta, lock)
    if run.outcome == COMPLETED and not run.complete:
        run.set_meta(outcome="", dismissed="")  # rounds.count was raised: the run goes on
    return run


def _lock(folder: Path) -> IO[bytes]:
    """Holds the folder for this process; the kernel lets go when the process ends, however it ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("wb")
    except OSError as error:
        raise storage_error(folder, error) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        remedy = "Stop the other coordinator, or choose another run.folder"
        raise ConfigError(problem(f"run.folder {folder}", "a folder of its own", "one in use", remedy)) from error
    return lock


def _create(shared: Shared, base: BaseModel, store: Store, folder: Path) -> dict[str, str]:
    meta = {
        "run_id": secrets.token_hex(8),
        "settings": shared.to_json(),
        "base_digest": base.digest,
        "created": str(time.time()),
    }
    write_atomically(folder / "settings.json", json.dumps(json.loads(shared.to_json()), indent=2) + "\n")
    store.call(records.write_meta(meta))
    return meta


def _version(shared: Shared, base: BaseModel, store: Store, blobs: Blobs) -> Version:
    row = store.call(records.read_version)
    if row is not None:
        return load_version(blobs, row)
    version = save_version(blobs, 0, begin(shared.method, base, shared.seed), None)
    store.call(records.write_version(version.row))
    return version


def _same_settings(shared: Shared, meta: dict[str, str], folder: Path) -> None:
    if "settings" not in meta or meta["settings"] == shared.to_json():
        return
    changed = differences(json.loads(meta["settings"]), json.loads(shared.to_json()))
    head = f"run.folder {folder} holds a run with other settings. Change them back, or choose another run.folder"
    raise ConfigError("\n".join([head, *changed]))


def _same_base(base: BaseModel, meta: dict[str, str], folder: Path) -> None:
    want = meta.get("base_digest", base.digest)
    if base.digest != want:
        remedy = "Put the old weights back, or choose another run.folder"
        raise ModelError(problem(f"base model of {folder}", f"SHA-256 {want}", base.digest, remedy))
