"""`fedtune init` writes a file that works, and does not overwrite one."""

import json
import sys

import pytest

from fedtune.config import load, parse
from fedtune.config.template import demo


def test_the_default_is_the_demo(fedtune, tmp_path):
    file = tmp_path / "new" / "config.toml"
    ended = fedtune("init", file)
    assert ended.code == 0
    assert load(file) == parse(demo())


def test_a_file_that_is_there_is_kept_unless_forced(fedtune, tmp_path):
    file = tmp_path / "config.toml"
    file.write_text("# mine\n")
    ended = fedtune("init", file)
    assert ended.code == 2
    assert "--force" in ended.err
    assert file.read_text() == "# mine\n"
    assert fedtune("init", file, "--force").code == 0
    assert load(file) == parse(demo())


@pytest.mark.parametrize(
    ("row", "keys"),
    [
        ({"text": "a"}, {"text": "text"}),
        ({"messages": [], "text": "a"}, {"messages": "messages"}),
        ({"id": 1, "prompt": "a", "response": "b"}, {"prompt": "prompt", "response": "response"}),
        ({"question": "a", "answer": "b"}, {"prompt": "question", "response": "answer"}),
        ({"body": "a"}, {"text": "body"}),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_columns_are_found_by_their_names(fedtune, tmp_path, row, keys, kind):
    data, file = tmp_path / f"rows.{kind}", tmp_path / "config.toml"
    if kind == "jsonl":
        data.write_text("\n" + json.dumps(row) + "\n")
    elif kind == "csv":
        data.write_text(",".join(row) + "\n" + ",".join("x" for _ in row) + "\n")
    else:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({name: ["x"] for name in row}), data)
    assert fedtune("init", file, "--data", data).code == 0
    found = load(file).data
    assert found.name == str(data)
    assert {k: getattr(found, k) for k in ("text", "prompt", "response", "messages") if getattr(found, k)} == keys


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("rows.jsonl", '{"a": 1, "b": 2}\n', "columns of"),
        ("rows.jsonl", "", "at least one row"),
        ("rows.jsonl", "[1]\n", "list where an object"),
        ("rows.jsonl", "{\n", "at least one row"),
        ("rows.csv", "", "at least one row"),
        ("rows.txt", "hello", ".jsonl, .csv or .parquet"),
        ("rows.parquet", "hello", "at least one row"),
    ],
)
def test_data_that_cannot_be_read_is_explained(fedtune, tmp_path, name, content, said):
    data, file = tmp_path / name, tmp_path / "config.toml"
    data.write_text(content)
    ended = fedtune("init", file, "--data", data)
    assert ended.code == 2
    assert said in ended.err
    assert not file.exists()


def test_a_missing_data_file_and_two_sources(fedtune, tmp_path):
    assert fedtune("init", tmp_path / "c.toml", "--data", tmp_path / "none.csv").code == 2
    assert "both" in fedtune("init", tmp_path / "c.toml", "--demo", "--data", "x.csv").err


@pytest.mark.parametrize(("name", "content"), [("r.jsonl", '{"text": "a", "n": 1}\n'), ("r.csv", "text,n\na,1\n")])
def test_a_byte_order_mark_is_no_part_of_the_first_column(fedtune, tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8-sig")
    ended = fedtune("init", tmp_path / "c.toml", "--data", tmp_path / name)
    assert ended.code == 0, ended.err
    assert load(tmp_path / "c.toml").data.text == "text"


def test_parquet_without_pyarrow_is_explained(fedtune, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    ended = fedtune("init", tmp_path / "c.toml", "--data", tmp_path / "rows.parquet")
    assert ended.code == 2
    assert "pip install pyarrow" in ended.err


def test_damaged_csv_is_explained(fedtune, tmp_path):
    (tmp_path / "rows.csv").write_text("x" * 200_000 + "\n")
    assert fedtune("init", tmp_path / "c.toml", "--data", tmp_path / "rows.csv").code == 2
