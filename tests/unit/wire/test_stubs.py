"""The committed messages are what the contract generates."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def test_stubs_are_fresh(tmp_path):
    pytest.importorskip("grpc_tools")
    spec = importlib.util.spec_from_file_location("generate", ROOT / "proto" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.generate(tmp_path)
    fresh = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    assert len(fresh) == 2
    for path in fresh:
        committed = ROOT / path.relative_to(tmp_path)
        assert committed.read_text() == path.read_text(), f"{committed.name} is stale: run python proto/generate.py"


def test_every_enum_value_has_its_sentence():
    lines = (ROOT / "proto" / "fedtune" / "wire" / "v1" / "coordinator.proto").read_text().splitlines()
    inside = False
    for line in lines:
        inside = line.startswith("enum ") or (inside and line != "}")
        if inside and "=" in line:
            assert "//" in line, line
