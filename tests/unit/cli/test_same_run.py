"""A run folder goes on only with the data, clients and rounds it was started with."""

import json

import pytest

from fedtune.cli.same_run import check_same, keep_same
from fedtune.config import parse
from fedtune.errors import ConfigError, StorageError


@pytest.fixture
def config(tmp_path):
    """Builds a configuration in the same folder each time."""

    def build(**sections):
        raw = {"data": {"name": "vader"}, "simulation": {"clients": 2, "ranks": [8, 4]}}
        for name, keys in sections.items():
            raw[name] = {**raw.get(name, {}), **keys}
        return parse({**raw, "run": {"folder": str(tmp_path)}})

    return build


@pytest.fixture
def started(config, tmp_path):
    keep_same(config())
    (tmp_path / "run.db").touch()


@pytest.mark.usefixtures("started")
@pytest.mark.parametrize(
    ("section", "key", "value", "said"),
    [
        ("simulation", "clients", 3, "expected 2, got 3"),
        ("simulation", "ranks", [8, 8], r"expected \[8, 4\], got \[8, 8\]"),
        ("simulation", "partition", "quantity", "expected 'iid', got 'quantity'"),
        ("data", "name", "other.csv", "expected 'vader', got 'other.csv'"),
        ("data", "max_rows", 5, "expected 0, got 5"),
        ("rounds", "clients", 1, "expected 0, got 1"),
    ],
)
def test_another_run_is_refused_and_the_key_named(config, section, key, value, said):
    with pytest.raises(ConfigError, match=rf"--set run\.folder=FOLDER\n  {section}\.{key}: {said}$"):
        check_same(config(**{section: {key: value}}))


@pytest.mark.usefixtures("started")
@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("rounds", "count", 9),
        ("rounds", "grace_s", 1.0),
        ("rounds", "deadline_s", 9.0),
        ("rounds", "attempts", 1),
        ("rounds", "quorum", 0.5),
        ("simulation", "concurrency", 1),
        ("simulation", "threads", 2),
        ("data", "held_out_rows", 3),
    ],
)
def test_what_may_change_may_change(config, section, key, value):
    check_same(config(**{section: {key: value}}))


def test_nothing_is_held_against_a_folder_without_a_run(config, tmp_path):
    keep_same(config())
    check_same(config(simulation={"clients": 3}))
    (tmp_path / "simulation.json").unlink()
    (tmp_path / "run.db").touch()
    check_same(config(simulation={"clients": 3}))


@pytest.mark.usefixtures("started")
def test_a_key_that_is_younger_than_the_run_had_its_default(config, tmp_path):
    stored = json.loads((tmp_path / "simulation.json").read_text())
    del stored["data"]["label"]
    (tmp_path / "simulation.json").write_text(json.dumps(stored))
    check_same(config())
    with pytest.raises(ConfigError, match=r"data\.label: expected '', got 'who'"):
        check_same(config(data={"label": "who"}))


@pytest.mark.usefixtures("started")
@pytest.mark.parametrize("content", ["{", "[1]", '{"data": 3}'])
def test_a_damaged_record_is_named(config, tmp_path, content):
    (tmp_path / "simulation.json").write_text(content)
    with pytest.raises(StorageError, match=r"simulation\.json"):
        check_same(config())
