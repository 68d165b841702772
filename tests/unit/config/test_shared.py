"""What coordinator and clients must agree on: canonical JSON, and a digest that two machines compute alike."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.config import Config, Shared, parse
from fedtune.errors import ConfigError

# A new key in [method], [training] or [model] changes this; so does a changed default. That is a new protocol version
# for programs that must work together: change it knowingly.
GOLDEN = "6e7e3a67cd4e7aa38471c97dd12412613805d6a854fc039066bfd8316bc0e09f"


def test_the_digest_of_the_defaults_is_known() -> None:
    assert Shared.of(Config()).digest() == GOLDEN


@given(
    rank=st.integers(1, 64),
    name=st.sampled_from(["flora", "fedavg-lora"]),
    rate=st.floats(1e-6, 1.0),
    seed=st.integers(0, 2**63 - 1),
    targets=st.lists(st.sampled_from(["q_proj", "k_proj", "all-linear"]), min_size=1, max_size=3),
)
def test_json_and_back_is_the_same(rank: int, name: str, rate: float, seed: int, targets: list[str]) -> None:
    method = {"name": name, "rank": rank, "target_modules": targets}
    shared = Shared.of(parse({"run": {"seed": seed}, "method": method, "training": {"learning_rate": rate}}))
    again = Shared.from_json(shared.to_json())
    assert again == shared
    assert again.to_json() == shared.to_json()
    assert again.digest() == shared.digest()


@pytest.mark.parametrize(
    "method",
    [
        {"name": "fedkseed", "krum_byzantine": 1},
        {"name": "flora", "krum_byzantine": 1},
        {"name": "ffa-lora", "trim": 1},
    ],
)
def test_robust_settings_reach_clients_who_know_nothing_of_rounds(method: dict[str, object]) -> None:
    shared = Shared.of(parse({"method": method, "rounds": {"min_clients": 5}}))
    assert Shared.from_json(shared.to_json()) == shared


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [("training", "steps", 11), ("method", "rank", 7), ("model", "dtype", "bfloat16"), ("run", "seed", 1)],
)
def test_what_is_shared_changes_the_digest(section: str, key: str, value: object) -> None:
    assert Shared.of(parse({section: {key: value}})).digest() != Shared.of(Config()).digest()


def test_what_concerns_one_machine_does_not() -> None:
    config = Config()
    other = replace(
        config,
        run=replace(config.run, folder=Path("elsewhere"), name="other"),
        data=replace(config.data, name="mine.jsonl"),
        client=replace(config.client, id="me", rank=3),
        rounds=replace(config.rounds, count=9),
    )
    assert Shared.of(other).digest() == Shared.of(config).digest()


def test_settings_of_a_newer_peer_are_refused_by_name() -> None:
    raw = json.loads(Shared.of(Config()).to_json())
    raw["training"]["looped"] = True
    with pytest.raises(ConfigError, match=r"settings from the coordinator(.|\n)*training.looped: unknown key"):
        Shared.from_json(json.dumps(raw))
