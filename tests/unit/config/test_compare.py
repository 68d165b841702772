"""Differences name the key, what it was and what it is."""

from fedtune.config.compare import differences


def test_only_what_differs_is_named():
    old = {"a": {"b": 1, "c": [1]}, "d": 2}
    new = {"a": {"b": 2, "c": [1]}, "e": 3}
    assert differences(old, old) == []
    assert differences(old, new) == [
        "  a.b: expected 1, got 2",
        "  d: expected 2, got 'nothing'",
        "  e: expected 'nothing', got 3",
    ]
