"""A configuration is checked whole: every fault is named at once, with its key, its value and what would be right."""

from dataclasses import fields
from pathlib import Path

import pytest

from fedtune.config import Config, load, parse
from fedtune.errors import ConfigError
from fedtune.methods import METHODS, FedAvgLoRA, FLoRA


def write(folder: Path, text: str) -> Path:
    path = folder / "config.toml"
    path.write_text(text)
    return path


def message(text: str, folder: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(write(folder, text), overrides)
    return str(caught.value)


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert load(write(tmp_path, "")) == Config()


def test_all_faults_are_reported_together(tmp_path: Path) -> None:
    text = """
    [run]
    seed = -1
    [training]
    steps = "many"
    learing_rate = 0.1
    [method]
    name = "flora"
    rank = 0
    [rounds]
    quorum = 2.0
    [sever]
    address = "x"
    """
    said = message(text, tmp_path)
    assert "6 faults" in said
    assert len(said.splitlines()) == 7
    for key in ("run.seed", "training.steps", "training.learing_rate", "method.rank", "rounds.quorum", "sever"):
        assert f"  {key}: " in said, key


@pytest.mark.parametrize(
    ("text", "suggestion"),
    [
        ("[training]\nlearing_rate = 1.0", "training.learing_rate: unknown key; did you mean learning_rate?"),
        ("[sever]\naddress = 'x'", "sever: unknown key; did you mean server?"),
        ("[method]\nname = 'flora'\nrnk = 4", "method.rnk: unknown key; did you mean rank?"),
        ("[method]\nname = 'fedavg-lora'\nmax_rank = 4", "method.max_rank: unknown key; "),
        ("[rounds]\nzzz = 1", "rounds.zzz: unknown key; known: count, clients, "),
    ],
)
def test_an_unknown_key_comes_with_a_suggestion(text: str, suggestion: str, tmp_path: Path) -> None:
    assert suggestion in message(text, tmp_path)


def test_a_value_of_the_wrong_kind_is_shown(tmp_path: Path) -> None:
    assert "(got 'many')" in message("[training]\nsteps = 'many'", tmp_path)


def test_an_unknown_method_names_the_known_ones(tmp_path: Path) -> None:
    said = message("[method]\nname = 'fedprox'", tmp_path)
    assert "method.name: expected one of flora, fedavg-lora, " in said
    assert "'fedprox'" in said


@pytest.mark.parametrize("line", ["name = 'dora'", "name = 'AdaLoRA'", "use_dora = true"])
def test_what_cannot_be_done_exactly_is_refused_with_the_reason(line: str, tmp_path: Path) -> None:
    said = message(f"[method]\n{line}", tmp_path)
    assert "is not supported: " in said
    assert "of clients' factors" in said or "of its own" in said


def test_a_missing_file_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="fedtune init"):
        load(tmp_path / "none.toml")


@pytest.mark.parametrize("content", [b"[run", b"a = ", b"\xff\xfe"])
def test_what_is_not_toml_is_refused_in_words(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="not valid TOML"):
        load(path)


def test_overrides_win_and_are_checked_like_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "[rounds]\ncount = 3\n")
    changed = load(path, ("rounds.count=5", "model.name=tiny", "simulation.ranks=[8, 4]", "method.name=fedavg-lora"))
    assert changed.rounds.count == 5
    assert changed.model.name == "tiny"
    assert changed.simulation.ranks == (8, 4)
    assert isinstance(changed.method, FedAvgLoRA)
    assert "rounds.count" in message("", tmp_path, "rounds.count=0")
    assert "did you mean count?" in message("", tmp_path, "rounds.cout=1")


@pytest.mark.parametrize("override", ["count=3", "rounds", "rounds.=3", "="])
def test_a_malformed_override_is_refused(override: str, tmp_path: Path) -> None:
    assert "section.key=value" in message("", tmp_path, override)


def test_an_override_of_a_key_that_is_a_table_in_the_file_is_a_fault_not_a_crash(tmp_path: Path) -> None:
    assert "rounds" in message("rounds = 3", tmp_path, "rounds.count=1")


@pytest.mark.parametrize("name", ["Run", "a_b", "-a", "a-", "", "a" * 65])
def test_ids_are_small_letters_digits_and_hyphens(name: str, tmp_path: Path) -> None:
    assert "run.name" in message(f"[run]\nname = '{name}'", tmp_path)


def test_parse_takes_a_mapping() -> None:
    assert parse({"method": {"name": "flora", "rank": 4}}).method == FLoRA(rank=4)
    with pytest.raises(ConfigError, match="method: expected a table"):
        parse({"method": 3})


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("[training]\nbetas = [2.0, 0.9]", "training.betas.0"),
        ("[training]\nlearning_rate = inf", "training.learning_rate"),
        ("[simulation]\nranks = [8, 0]", "simulation.ranks.1"),
        ("[simulation]\nranks = [-1]", "simulation.ranks.0"),
        ("[simulation]\nalphas = [-1.0]", "simulation.alphas.0"),
        ("[simulation]\nconcentration = inf", "simulation.concentration"),
        ("[client]\naddress = '127.0.0.1:notaport'", "client.address"),
        ("[client]\naddress = 'localhost'", "client.address"),
        ("[server]\naddress = ''", "server.address"),
        ("[server]\naddress = '127.0.0.1:70000'", "server.address"),
        ("[data]\ntemplate = '{question}'", "data.template"),
        ("[data]\ntemplate = '{'", "data.template"),
        ("[data]\ntemplate = 'no prompt'", "data.template"),
        ("[method]\nname = ['flora']", "method.name"),
        ("[method]\nalpha = nan", "method.alpha"),
    ],
)
def test_a_value_that_cannot_work_is_named_before_anything_starts(text: str, key: str, tmp_path: Path) -> None:
    said = message(text, tmp_path)
    assert "1 fault\n" in said
    assert f"  {key}: " in said


def test_an_ipv6_address_and_braces_in_a_template_are_fine(tmp_path: Path) -> None:
    config = load(write(tmp_path, "[server]\naddress = '[::1]:0'\n[data]\ntemplate = '{{Q}} {prompt}'"))
    assert config.server.address == "[::1]:0"
    assert config.data.template.format(prompt="x") == "{Q} x"


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text("[run]\nname = 'team'\n", encoding="utf-8-sig")
    assert load(path).run.name == "team"


@pytest.mark.parametrize("value", ["3\nother = 4", '"""a\nb"""', "bare\nword"])
def test_an_override_is_one_line(value: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--set data\.name: expected one line"):
        load(write(tmp_path, ""), (f"data.name={value}",))


def test_an_override_may_hold_an_escaped_newline(tmp_path: Path) -> None:
    assert load(write(tmp_path, ""), ('data.template="Q: {prompt}\\nA: "',)).data.template == "Q: {prompt}\nA: "


@pytest.mark.parametrize(
    ("method", "rounds", "fits"),
    [
        ("name = 'flora'\nkrum_byzantine = 1", "min_clients = 4", False),
        ("name = 'flora'\nkrum_byzantine = 1", "min_clients = 5", True),
        ("name = 'fedavg-lora'\nkrum_byzantine = 1", "min_clients = 8\nquorum = 0.5", False),
        ("name = 'fedavg-lora'\nkrum_byzantine = 1", "min_clients = 9\nquorum = 0.5", True),
        ("name = 'ffa-lora'\ntrim = 1", "min_clients = 3\nclients = 2", False),
        ("name = 'ffa-lora'\ntrim = 1", "min_clients = 3", True),
        ("name = 'flora'\nclip_norm = 1.0", "", True),
    ],
)
def test_robust_folding_needs_enough_clients_for_certain(method: str, rounds: str, fits: bool, tmp_path: Path) -> None:
    text = f"[method]\n{method}\n[rounds]\n{rounds}\n"
    if fits:
        load(write(tmp_path, text))
    else:
        assert "rounds.min_clients: expected enough for" in message(text, tmp_path)


def test_a_table_within_the_method_names_its_own_keys(tmp_path: Path) -> None:
    said = message("[method.server_optimizer]\nname = 'momentum'\nlearning_rat = 1.0", tmp_path)
    assert "method.server_optimizer.learning_rat: unknown key; did you mean learning_rate?" in said


@pytest.mark.parametrize("key", ["server_optimizer", "krum_byzantine", "clip_norm", "trim", "start", "rank_budget"])
@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_key_of_another_method_is_refused_by_name(name: str, key: str, tmp_path: Path) -> None:
    having = {kind for kind, cls in METHODS.items() if key in {f.name for f in fields(cls)}}
    if name in having:
        pytest.skip("has it")
    said = message(f"[method]\nname = '{name}'\n{key} = 1", tmp_path)
    assert f"method.{key}: unknown key; {name} does not have it, but " in said
    assert set(said.split(", but ")[1].removesuffix("; remove it").split(", ")) == having
