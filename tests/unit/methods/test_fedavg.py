"""FedAvg of whole models against the arithmetic of its paper, on numpy arrays."""

import numpy as np
import pytest

from fedtune.errors import ConfigError, ProtocolError, WireError
from fedtune.method import BaseModel, Member
from fedtune.methods import FedAvg
from fedtune.methods.fedavg import FILE, chosen, filled
from fedtune.tensors import Manifest, TensorSpec

SPECS = (
    TensorSpec("model.embed_tokens.weight", (7, 4), "bfloat16"),
    TensorSpec("model.layers.0.mlp.up_proj.weight", (6, 4), "bfloat16"),
    TensorSpec("model.layers.1.mlp.up_proj.weight", (6, 4), "bfloat16"),
    TensorSpec("model.layers.1.norm.weight", (4,), "bfloat16"),
    TensorSpec("model.counts", (3,), "int64"),
)
BASE = BaseModel("base", Manifest(SPECS), "0" * 64)
WEIGHTS = {"a": 10, "b": 30, "c": 5}


def updates(method, state, seed=1):
    rng = np.random.Generator(np.random.Philox(seed))
    specs = method.template(state, Member("a")).specs
    return {m: {s.name: rng.normal(0, 0.01, s.shape).astype(np.float32) for s in specs} for m in WEIGHTS}


def closed(method, state, sent, order=("a", "b", "c")):
    total = None
    for name in order:
        payload = b"".join(method.encode(sent[name], method.template(state, Member(name))))
        total = method.take(total, payload, state, Member(name), WEIGHTS[name])
    return method.finish(state, total, sum(WEIGHTS.values()))


def public(state):
    return {name: array for name, array in state.items() if not name.startswith("private/")}


def test_the_state_moves_by_the_weighted_mean_of_the_differences():
    method = FedAvg()
    state, want = method.init(BASE, 0), 0.0
    for number in range(3):
        sent = updates(method, state, number)
        state = closed(method, state, sent)
        want = want + sum(WEIGHTS[m] * sent[m]["model.layers.0.mlp.up_proj.weight"].astype(float) for m in sent) / 45
    np.testing.assert_allclose(state["model.layers.0.mlp.up_proj.weight"], want, rtol=1e-6, atol=1e-9)
    assert all(array.dtype == np.float32 for array in state.values())


def test_the_order_leaves_no_trace():
    method = FedAvg(uplink={"codec": "ternary", "density": 0.3})
    state = method.init(BASE, 0)
    sent = updates(method, state)
    one, other = closed(method, state, sent), closed(method, state, sent, ("c", "a", "b"))
    assert {n: a.tobytes() for n, a in one.items()} == {n: a.tobytes() for n, a in other.items()}


def test_the_first_state_has_shapes_and_no_bytes():
    state = FedAvg().init(BASE, 0)
    assert sum(array.nbytes for array in state.values()) == 0
    assert FedAvg().template(state, Member("a")).specs == tuple(
        TensorSpec(s.name, s.shape, "float32") for s in SPECS[:4]
    )
    assert {n: a.shape for n, a in filled(state).items()} == {s.name: s.shape for s in SPECS[:4]}


@pytest.mark.parametrize(
    ("targets", "found"),
    [
        (("all",), [0, 1, 2, 3]),
        (("up_proj",), [1, 2]),
        (("layers.1",), [2, 3]),
        (("norm", "embed_tokens"), [0, 3]),
        (("layers.0.mlp.up_proj.weight",), [1]),
    ],
)
def test_targets_are_whole_parts_of_names(targets, found):
    assert chosen(BASE.weights, targets) == [SPECS[i] for i in found]


@pytest.mark.parametrize("target", ["proj", "layers.2", "counts", "up_proj.w"])
def test_a_target_that_fits_nothing_is_an_error(target):
    with pytest.raises(ConfigError, match=r"method\.target_modules"):
        FedAvg(target_modules=("norm", target)).init(BASE, 0)


def test_a_client_with_a_rank_is_refused():
    with pytest.raises(ProtocolError, match="no adapter"):
        FedAvg().admit(Member("a", rank=4))


@pytest.mark.parametrize("codec", ["raw", "bf16", "int8", "int4", "ternary", "ere", "delta-come"])
def test_updates_of_another_size_are_refused(codec):
    method = FedAvg(uplink=codec)
    state, member = method.init(BASE, 0), Member("a")
    payload = b"".join(method.encode(updates(method, state)["a"], method.template(state, member)))
    least, most = method.sizes(state, member)
    assert least <= len(payload) <= most
    for bad in (payload[:-1], payload + b"\0", b""):
        with pytest.raises(WireError):
            method.take(None, bad, state, member, 1)


@pytest.mark.parametrize("outer", ["momentum", "nesterov", "adam", "yogi"])
def test_server_optimizers_take_their_step_from_the_mean(outer):
    method = FedAvg(server_optimizer=outer)
    state = method.init(BASE, 0)
    sent = updates(method, state)
    plain, after = closed(FedAvg(), state, sent), closed(method, state, sent)
    zeros = filled(public(state))
    want = method.server_optimizer.step(zeros, {n: a.astype(float) for n, a in plain.items()}, state)
    for name in zeros:
        np.testing.assert_allclose(after[name], want[name], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("codec", ["ternary", "int8", "delta-come"])
def test_a_downlink_moves_the_state_by_what_was_sent_and_feedback_makes_up(codec):
    method = FedAvg(downlink={"codec": codec, "feedback": True})
    state, plain = method.init(BASE, 0), FedAvg().init(BASE, 0)
    client = filled(state)
    for number in range(4):
        sent = updates(method, plain, number)
        state, plain = closed(method, state, sent), closed(FedAvg(), plain, sent)
        received = method.broadcast(state, number)
        assert list(received) == ["step"]
        client = method.unpacked(type("Job", (), {"shifted": lambda self, held=client: held})(), received)
        assert {n: a.tobytes() for n, a in client.items()} == {n: public(state)[n].tobytes() for n in client}
    name = "model.layers.0.mlp.up_proj.weight"
    left = state[f"private/residual/{name}"] * 2.0**-52
    np.testing.assert_allclose(state[name] + left, plain[name], atol=1e-6)


def test_the_export_is_the_change(tmp_path):
    from safetensors.numpy import load_file

    method = FedAvg()
    state = closed(method, method.init(BASE, 0), updates(method, method.init(BASE, 0)))
    method.export(state, tmp_path, "base")
    assert {n: a.tobytes() for n, a in load_file(tmp_path / FILE).items()} == {n: a.tobytes() for n, a in state.items()}
