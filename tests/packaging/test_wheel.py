"""The wheel holds three packages and nothing else, and works in an environment of its own."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from fedtune import __version__

ROOT = Path(__file__).parents[2]
DATA = {"fedtune/directions/quantiles.u16"}
PACKAGES = {"fedtune", "fedtune_server", "fedtune_client"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built without a network: the build backend is in the dev extra."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(ROOT)], check=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean environment with the wheel; the dependencies are lent by this one, which holds no copy of ours."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder, symlinks=True)
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python")]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel)], check=True)
    (target,) = folder.glob("lib/python*/site-packages")
    lend(target)
    return folder / "bin" / "python"


def lend(target: Path) -> None:
    """Makes this environment's packages visible behind the clean one's own; editable installs stay out of sight."""
    (target / "lent.pth").write_text(f"{sysconfig.get_path('purelib')}\n")


def run(python: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    return subprocess.run(
        [*arguments], capture_output=True, text=True, cwd=python.parents[1], env=environment, timeout=60
    )


def test_top_level_names(wheel: Path) -> None:
    names = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {name for name in names if not name.endswith(".dist-info")} == PACKAGES


def test_every_package_says_that_it_is_typed(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"{package}/py.typed" for package in PACKAGES} <= names


def test_nothing_but_code_and_its_tables_is_shipped(wheel: Path) -> None:
    odd = [n for n in zipfile.ZipFile(wheel).namelist() if not n.endswith((".py", ".pyi", "py.typed", ".proto"))]
    assert {name for name in odd if ".dist-info/" not in name} <= DATA


def test_every_module_in_the_tree_is_in_the_wheel(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for package, parent in (
        ("fedtune", ROOT),
        ("fedtune_server", ROOT / "server"),
        ("fedtune_client", ROOT / "client"),
    ):
        for module in (parent / package).rglob("*.py"):
            assert str(module.relative_to(parent)) in names


def test_no_package_is_made_of_a_folder_that_is_none() -> None:
    for folder in ("proto", "server", "client", "simulations", "tests", "benchmarks"):
        assert not (ROOT / folder / "__init__.py").exists()


def test_the_console_script(python: Path) -> None:
    done = run(python, str(python.with_name("fedtune")), "--version")
    assert (done.returncode, done.stdout.strip()) == (0, f"fedtune {__version__}"), done.stderr
    assert "simulate" in run(python, str(python.with_name("fedtune")), "--help").stdout


@pytest.mark.parametrize("module", ["fedtune", "fedtune_server", "fedtune_client", "fedtune_client.host"])
def test_the_programs(python: Path, module: str) -> None:
    done = run(python, str(python), "-m", module, "--help")
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout.lower()


def test_it_is_the_wheel_that_was_tested(python: Path) -> None:
    for package in PACKAGES:
        found = run(python, str(python), "-c", f"import {package}; print({package}.__file__)").stdout
        assert str(python.parents[1]) in found
