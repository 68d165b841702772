"""The command as a whole: quick to answer, no traceback for a user's mistake, the right exit code."""

import os
import subprocess
import sys

import pytest

from fedtune import __version__
from fedtune.cli.main import app
from fedtune.errors import FedtuneError

COMMANDS = [command.name for command in app.registered_commands]


def test_version(fedtune):
    ended = fedtune("--version")
    assert (ended.code, ended.out.strip()) == (0, f"fedtune {__version__}")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_an_example(fedtune, command):
    ended = fedtune(command, "--help")
    assert ended.code == 0
    assert f"fedtune {command}" in ended.out
    assert "Example" in ended.out


def test_help_imports_nothing_heavy():
    script = (
        "import sys; sys.argv = ['fedtune', '--help']\n"
        "from fedtune.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'grpc', 'matplotlib', 'numpy', 'safetensors', 'peft'} & set(sys.modules)\n"
        "print('HEAVY', sorted(heavy))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "HEAVY []" in done.stdout


@pytest.mark.parametrize(
    "arguments", [("nonsense",), ("simulate",), ("simulate", "--nonsense"), ("client", "c", "--index", "-1")]
)
def test_a_wrong_command_line_is_explained(fedtune, arguments):
    ended = fedtune(*arguments)
    assert ended.code == 2
    assert "Usage: " in ended.err
    assert "Traceback" not in ended.err


def test_an_error_of_fedtune_is_a_message_and_its_exit_code(fedtune, tmp_path):
    file = tmp_path / "bad.toml"
    file.write_text("[training]\nsteps = -1\nlooped = [red]\n")
    ended = fedtune("simulate", file)
    assert ended.code == 2
    assert ended.err.startswith("error: ")
    file.write_text("[training]\nsteps = -1\nlooped = '[red]'\n")
    ended = fedtune("simulate", file)
    assert "training.steps" in ended.err
    assert "training.looped" in ended.err
    assert "Traceback" not in ended.err


def test_square_brackets_in_a_message_are_no_markup(fedtune, monkeypatch):
    def fail(*_: object) -> None:
        raise FedtuneError("layers: expected [bold], got [/]")

    monkeypatch.setattr("fedtune.cli.status._show_folder", fail)
    assert "expected [bold], got [/]" in fedtune("status", os.curdir).err


@pytest.mark.parametrize("error", FedtuneError.__subclasses__())
def test_every_kind_of_error_ends_with_its_code(fedtune, monkeypatch, error):
    def fail(*_: object) -> None:
        raise error("what happened")

    monkeypatch.setattr("fedtune.cli.status._show_folder", fail)
    ended = fedtune("status", os.curdir)
    assert (ended.code, ended.err.strip()) == (error.exit_code, "error: what happened")


def test_ctrl_c_ends_with_130(fedtune, monkeypatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fedtune.cli.status._show_folder", interrupt)
    ended = fedtune("status", os.curdir)
    assert ended.code == 130
    assert "interrupted" in ended.err


def test_a_bug_is_not_hidden(monkeypatch):
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("fedtune.cli.status._show_folder", fail)
    monkeypatch.setattr("sys.argv", ["fedtune", "status", os.curdir])
    from fedtune.cli.main import main

    with pytest.raises(ZeroDivisionError):
        main()
