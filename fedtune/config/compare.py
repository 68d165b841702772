"""What differs between two trees of settings, key by key."""

from typing import Any


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Writes a tree as one level: `{"a": {"b": 1}}` becomes `{"a.b": 1}`."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found.update(flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return found


def differences(want: dict[str, Any], got: dict[str, Any]) -> list[str]:
    """Returns a line for each key that differs; an empty list when the trees are equal."""
    old, new = flat(want), flat(got)
    return [
        f"  {key}: expected {old.get(key, 'nothing')!r}, got {new.get(key, 'nothing')!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
