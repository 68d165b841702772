"""Every shell command and every Python block of the documentation runs as it stands, in a folder of its own.

```sh blocks run; ```bash blocks cannot be run here, and a comment above each says why.
"""

import contextlib
import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedtune.cli.main import _EPILOG
from fedtune.errors import FedtuneError
from fedtune.methods import METHODS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# Run by .ci/run itself, or this very test suite.
ELSEWHERE = {"README.md": ("command one", "command two"), "CONTRIBUTING.md": ("format and lint",)}
BLOCK = re.compile(r"^(?:<!-- (?P<note>[^\n]*) -->\n)?```(?P<kind>\w+)\n(?P<text>.*?)^```$", re.M | re.S)


def blocks(page: Path) -> list[re.Match[str]]:
    return list(BLOCK.finditer(page.read_text()))


def elsewhere(page: Path, block: re.Match[str]) -> bool:
    words = ELSEWHERE.get(page.name, ())
    return any(word in (block["note"] or "") or word in block["text"] for word in words)


def script(page: Path) -> str:
    """The page as one shell script; Python blocks become calls."""
    parts = ["set -e"]
    for block in blocks(page):
        if block["kind"] == "sh" and not elsewhere(page, block):
            parts.append(block["text"])
        elif block["kind"] == "python":
            parts.append(f"python - <<'PYTHON_BLOCK'\n{block['text']}PYTHON_BLOCK")
    return "\n".join(parts) + "\n"


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """What the pages' commands run in; Flower has a home and a port of its own, and is ended afterwards."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    alone = {"FLWR_HOME": str(tmp_path / "flwr"), "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": port}
    offline = {"FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1"}
    yield {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **quiet, **alone, **offline}
    for number in (signal.SIGTERM, signal.SIGKILL):
        until = time.monotonic() + 10
        while (found := _running(f"FLWR_HOME={alone['FLWR_HOME']}")) and time.monotonic() < until:
            for pid in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            time.sleep(0.2)


def _start_flower(environment: dict[str, str]) -> None:
    """Starts the SuperLink of simulations, which Flower would start itself, but with 15 seconds to do it in."""
    port = environment["FLWR_LOCAL_SUPERLINK_HTTP_API_PORT"]
    command = ["flower-superlink", "--insecure", "--simulation", "--isolation", "subprocess", "--host", "127.0.0.1"]
    subprocess.Popen([*command, "--port", port], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 240
    while time.monotonic() < until:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", int(port))) == 0:
                return
        time.sleep(0.1)


def _running(mark: str) -> list[int]:
    """Processes that have `mark` in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", [p for p in PAGES if len(script(p)) > 10], ids=lambda page: page.name)
def test_a_page_runs_from_top_to_bottom(page: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    if page.name == "flower.md" and importlib.util.find_spec("flwr") is None:
        pytest.skip("flwr is not installed: pip install 'fedtune[flower]'")
    if page.name == "flower.md":
        _start_flower(environment)
    for name in ("server", "client", "simulations"):
        shutil.copytree(ROOT / name, tmp_path / name)  # a page may write into them
    with (tmp_path / "said.log").open("w+") as log:  # no pipe: Flower leaves a program behind that would hold it open
        done = subprocess.run(
            ["bash", "-c", script(page)], cwd=tmp_path, env=environment, stdout=log, stderr=log, timeout=580
        )
    said = (tmp_path / "said.log").read_text()
    assert done.returncode == 0, said[-6000:]
    assert "Traceback" not in said


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_is_not_run_says_why(page: Path) -> None:
    for block in blocks(page):
        assert block["kind"] in ("sh", "bash", "python", "toml"), block["kind"]
        if block["kind"] == "bash":
            assert (block["note"] or "").startswith("not run by tests: "), block["text"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_files_and_folders_that_the_readme_names_exist() -> None:
    for name in re.findall(
        r"`((?:tests|simulations|docs|fedtune|server|client)/[\w./-]*)`", (ROOT / "README.md").read_text()
    ):
        assert (ROOT / name).exists(), name


def test_ci_runs_the_readmes_two_commands() -> None:
    """.ci/run takes them from the README, so they cannot drift; here: it finds both, and they are what they claim."""
    run = (ROOT / ".ci" / "run").read_text()
    finder = run[run.index("command_of()") : run.index("}\n", run.index("command_of()")) + 2]
    notes = {block["note"]: block["text"] for block in blocks(ROOT / "README.md") if block["note"]}
    for name, word in (("command one", "fedtune simulate simulations/demo/config.toml"), ("command two", "pytest")):
        found = subprocess.run(
            ["bash", "-c", f'{finder}command_of "{name}"'], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        assert found == notes[name]
        assert word in found
        assert f"eval \"$(command_of '{name}')\"" in run


def test_every_exit_code_is_explained() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    for kind in (kind for kind in FedtuneError.__subclasses__() if kind.__module__ == FedtuneError.__module__):
        assert f"| {kind.exit_code} | {kind.__name__} |" in page
        assert re.search(rf"\b{kind.exit_code} \w", _EPILOG), kind


def test_the_readme_lists_every_method() -> None:
    table = (ROOT / "README.md").read_text()
    assert [name for name in METHODS if f"| `{name}` |" not in table] == []
