import csv
import json
from collections import Counter
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from fedtune.config import parse
from fedtune.errors import DataError, UnavailableError
from fedtune.training.data import all_client_rows, client_rows, held_out_rows, read, with_columns
from fedtune.training.rows import read_dataset, read_file

_ROWS = [{"q": f"question {i}", "a": f"answer {i}", "kind": "ab"[i % 2]} for i in range(40)]


def _write(path: Path, rows) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def _config(name, seed: int = 0, simulation=None, **data):
    data = {"prompt": "q", "response": "a", **data} if not {"text", "messages"} & set(data) else data
    return parse({"data": {"name": str(name), **data}, "run": {"seed": seed}, "simulation": simulation or {}})


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_every_format_gives_the_same_rows(tmp_path, ending):
    path = _write(tmp_path / f"data.{ending}", _ROWS)
    assert read(_config(path).data) == _ROWS


def test_a_folder_is_read_in_order_of_name(tmp_path):
    _write(tmp_path / "b.jsonl", _ROWS[20:])
    _write(tmp_path / "a.csv", _ROWS[:20])
    (tmp_path / "README.md").write_text("not data")
    assert read(_config(tmp_path).data) == _ROWS


def test_odd_characters_survive(tmp_path):
    rows = [{"q": 'a "quoted", line\nbroken', "a": "größe \u2028 here"}]
    for ending in ("jsonl", "csv", "parquet"):
        assert read(_config(_write(tmp_path / f"x.{ending}", rows)).data) == rows


def test_a_saved_data_set_of_the_datasets_library(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(_ROWS).save_to_disk(str(tmp_path / "saved"))
    assert read(_config(tmp_path / "saved").data) == _ROWS


def test_messages_may_be_json_in_a_column(tmp_path):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    path = _write(tmp_path / "m.csv", [{"m": json.dumps(messages)}])
    assert read(_config(path, messages="m").data)[0]["m"] == messages


def _says(config) -> str:
    with pytest.raises(DataError) as caught:
        read(config.data)
    return str(caught.value)


def test_a_missing_file(tmp_path):
    assert "does not exist" in _says(_config(tmp_path / "none.jsonl"))


def test_no_name_at_all():
    assert "data.name" in _says(_config(""))
    assert "vader" in _says(_config(""))


def test_a_row_without_its_column_is_named_with_file_and_columns(tmp_path):
    rows = [*_ROWS[:3], {"q": "lonely", "kind": "a"}]
    said = _says(_config(_write(tmp_path / "d.jsonl", rows)))
    assert "d.jsonl, row 4" in said
    assert "'a'" in said
    assert "columns q, kind" in said


def test_an_empty_answer_is_named(tmp_path):
    assert "row 1, column 'a'" in _says(_config(_write(tmp_path / "d.jsonl", [{"q": "x", "a": " "}])))


def test_no_columns_configured_lists_those_there_are(tmp_path):
    path = _write(tmp_path / "d.jsonl", _ROWS)
    said = _says(parse({"data": {"name": str(path)}}))
    assert "has the columns q, a, kind" in said
    assert "text, prompt with response, or messages" in said


@pytest.mark.parametrize("columns", [{"prompt": "q"}, {"text": "q", "prompt": "q", "response": "a"}])
def test_half_or_twice_configured_columns(tmp_path, columns):
    path = _write(tmp_path / "d.jsonl", _ROWS)
    assert "expected one of" in _says(parse({"data": {"name": str(path), **columns}}))


def test_damaged_files(tmp_path):
    bad = {
        "a.jsonl": b'{"q": "x", "a": "y"}\n{"q": \n',
        "b.jsonl": b'["q"]\n',
        "c.jsonl": b"",
        "d.jsonl": b"\xff\xfe\x00",
        "e.parquet": b"not parquet",
        "f.csv": b"q,a\n1,2,3\n",
        "g.csv": b"q,a\n1\n",
        "h.txt": b"hello",
        "i.csv": b'q,a\n"1,2\n',
        "j.csv": b"q;a\n1;2\n",
        "k.csv": b"q\ta\n1\t2\n",
    }
    says = {"a": "row 2", "b": "JSON object", "c": "at least one row", "d": "UTF-8", "e": "Parquet", "f": "more"}
    says |= {"g": "fewer", "h": ".jsonl", "i": "CSV", "j": "Save it with commas", "k": "Save it with commas"}
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
        said = _says(_config(tmp_path / name))
        assert name in said
        assert says[name[0]] in said


@pytest.mark.parametrize(
    "value", ["hello", [{"role": "user"}], [{"role": "user", "content": "x"}], [{"role": "robot"}]]
)
def test_messages_that_are_none(tmp_path, value):
    assert "row 1" in _says(_config(_write(tmp_path / "m.jsonl", [{"m": value}]), messages="m"))


def test_an_unknown_data_set_without_a_hub(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def refused(*args, **options):
        raise ValueError("no such data set")

    monkeypatch.setattr("fedtune.training.rows.hub_answers", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", refused)
    said = _says(_config("someone/something"))
    assert "someone/something" in said
    assert "no such data set" in said


def test_a_hub_that_does_not_answer_is_not_asked_again_but_what_is_on_disk_counts(monkeypatch):
    datasets = pytest.importorskip("datasets")
    from huggingface_hub import constants

    def load(name, split):
        assert datasets.config.HF_HUB_OFFLINE
        assert constants.HF_HUB_OFFLINE
        if name != "here/already":
            raise ConnectionError("offline")
        return [{"text": "kept"}]

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_dataset("here/already", "train") == [{"text": "kept"}]
    with pytest.raises(UnavailableError, match=r"data\.name 'someone/something'.*no connection.*built-in"):
        read_dataset("someone/something", "train")
    assert not datasets.config.HF_HUB_OFFLINE


def test_held_out_rows_are_trained_on_by_nobody(tmp_path):
    config = _config(_write(tmp_path / "d.jsonl", _ROWS), held_out=0.25)
    held, trained = held_out_rows(config), client_rows(config)
    assert len(held) == 10
    assert sorted([*held, *trained], key=lambda row: int(row["q"].split()[1])) == _ROWS


def test_the_held_out_rows_follow_the_seed_and_keep_the_labels_shares(tmp_path):
    path = _write(tmp_path / "d.jsonl", _ROWS)
    one, same, other = (held_out_rows(_config(path, seed, held_out=0.2, label="kind")) for seed in (1, 1, 2))
    assert one == same
    assert one != other
    assert Counter(row["kind"] for row in one) == {"a": 4, "b": 4}


def test_a_file_of_held_out_rows(tmp_path):
    path, other = _write(tmp_path / "d.jsonl", _ROWS), _write(tmp_path / "e.jsonl", _ROWS[:5])
    config = _config(path, held_out_name=str(other), held_out_rows=3)
    assert len(held_out_rows(config)) == 3
    assert client_rows(config) == _ROWS


def test_nothing_held_out(tmp_path):
    config = _config(_write(tmp_path / "d.jsonl", _ROWS), held_out=0)
    assert client_rows(config) == _ROWS
    with pytest.raises(DataError, match="held_out"):
        held_out_rows(config)


def test_max_rows(tmp_path):
    config = _config(_write(tmp_path / "d.jsonl", _ROWS), max_rows=10, held_out=0.2)
    assert len(client_rows(config)) == 8
    assert len(held_out_rows(config)) == 2


def test_clients_share_out_what_is_not_held_out(tmp_path):
    path = _write(tmp_path / "d.jsonl", _ROWS)
    for kind in ("iid", "label", "quantity", "natural"):
        simulation = {"clients": 2, "partition": kind}
        config = _config(path, simulation=simulation, label="kind", client_key="kind")
        parts = [client_rows(config, index) for index in range(2)]
        assert parts == all_client_rows(config)
        assert sorted(row["q"] for part in parts for row in part) == sorted(row["q"] for row in client_rows(config))
        if kind == "natural":
            assert [{row["kind"] for row in part} for part in parts] == [{"a"}, {"b"}]
    with pytest.raises(DataError, match="client index"):
        client_rows(config, 2)


def test_one_client_has_all_rows_in_the_order_of_the_file(tmp_path):
    config = _config(_write(tmp_path / "d.jsonl", _ROWS), simulation={"clients": 1})
    assert client_rows(config, 0) == client_rows(config)


def test_topics_are_always_there():
    config = _config("topics", text="")
    rows = client_rows(config)
    assert with_columns(config.data).text == "text"
    assert len(rows) > 500
    assert not {row["text"] for row in held_out_rows(config)} & {row["text"] for row in rows}


def test_columns_of_a_built_in_data_set_can_be_chosen():
    data = with_columns(parse({"data": {"name": "vader", "text": "text"}}).data)
    assert (data.text, data.prompt, data.label) == ("text", "", "label")
    assert with_columns(parse({"data": {"name": "vader", "client_key": "document"}}).data).client_key == "document"


def test_a_csv_field_may_be_of_any_length(tmp_path):
    before = csv.field_size_limit()
    (tmp_path / "rows.csv").write_text("text,n\n" + "x" * 300_000 + ",1\nb,2\n")
    assert [len(row["text"]) for _, row in read_file(tmp_path / "rows.csv")] == [300_000, 1]
    assert csv.field_size_limit() == before
