"""Every shell command and every Python block of the documentation runs as it stands, in a folder of its own.

```sh blocks run; ```bash blocks cannot be run here, and a comment above each says why.
"""

import os
import re
import shutil
import subprocess
import sys
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


@pytest.mark.parametrize("page", [p for p in PAGES if len(script(p)) > 10], ids=lambda page: page.name)
def test_a_page_runs_from_top_to_bottom(page: Path, tmp_path: Path) -> None:
    for name in ("server", "client", "simulations"):
        shutil.copytree(ROOT / name, tmp_path / name)  # a page may write into them
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", "-c", script(page)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "Traceback" not in done.stderr


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
