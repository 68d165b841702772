"""The log of events is read while it grows."""

from fedtune.report.events import Tail, read_events


def test_a_line_that_is_half_written_is_left_for_later(tmp_path):
    path = tmp_path / "events.jsonl"
    tail = Tail(path)
    assert tail.read() == []
    path.write_text('{"event": "a"}\n{"event": ')
    assert [e["event"] for e in tail.read()] == ["a"]
    with path.open("a") as stream:
        stream.write('"b"}\n')
    assert [e["event"] for e in tail.read()] == ["b"]
    assert tail.read() == []


def test_from_the_end_skips_what_was_there(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_text('{"event": "old"}\n')
    tail = Tail(path, from_end=True)
    with path.open("a") as stream:
        stream.write('{"event": "new"}\n')
    assert [e["event"] for e in tail.read()] == ["new"]


def test_lines_that_are_no_events_are_passed_over(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'\xff\xfe\n[]\n{}\n{"event": 3}\n\n{"event": "a", "x": 1}\n')
    assert read_events(path) == [{"event": "a", "x": 1}]
