"""FLoRA's compressed uplink: ternary codes of balanced factors, plain codecs of the factors themselves."""

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from fedtune.balance import balanced
from fedtune.codecs.compression import Compression
from fedtune.errors import WireError
from fedtune.lora import key_a, key_b, layers_of
from fedtune.method import Member
from fedtune.methods import FLoRA
from fedtune.rounds import Round
from fedtune.tensors import digest

TERNARY = Compression(codec="ternary", density=0.2)
MEMBER = Member("a", 3, 6.0)


def trained(method, state, seed=0):
    """Factors as training leaves them: A holds the noise it was drawn from, B little but what was learned."""
    rng = np.random.Generator(np.random.Philox(seed))
    manifest = method.template(state, MEMBER)
    scale = {"A": 0.25, "B": 0.002}
    return manifest, {s.name: (scale[s.name[-1]] * rng.normal(size=s.shape)).astype(np.float32) for s in manifest.specs}


def error(one, other):
    apart = whole = 0.0
    for layer in layers_of(one):
        product = one[key_b(layer)] @ one[key_a(layer)]
        apart += float(np.square(other[key_b(layer)] @ other[key_a(layer)] - product).sum())
        whole += float(np.square(product).sum())
    return (apart / whole) ** 0.5


def sent(method, state, update, manifest):
    payload = b"".join(method.encode(update, manifest))
    fewest, most = method.sizes(state, MEMBER)
    assert fewest <= len(payload) <= most
    return payload, method.decode(payload, state, MEMBER)


def test_ternary_codes_are_of_balanced_factors(base):
    method = FLoRA(rank=3, uplink=TERNARY)
    state = method.init(base, 0)
    manifest, update = trained(method, state)
    payload, back = sent(method, state, update, manifest)
    assert payload == b"".join(TERNARY.coder.encode(balanced(update), manifest))
    as_trained = TERNARY.coder.decode(b"".join(TERNARY.coder.encode(update, manifest)), manifest)
    assert error(update, as_trained) > 0.99  # one threshold keeps only the noise in A
    assert error(update, back) < 0.8


@pytest.mark.parametrize(("codec", "limit"), [("bf16", 0.01), ("int8", 0.02), ("int4", 0.3)])
def test_other_codecs_take_the_factors_as_they_are(base, codec, limit):
    method = FLoRA(rank=3, uplink=Compression(codec=codec))
    state = method.init(base, 0)
    manifest, update = trained(method, state)
    assert error(update, sent(method, state, update, manifest)[1]) < limit


def test_a_round_stacks_what_was_decoded(base):
    method, plain = FLoRA(rank=3, uplink=TERNARY), FLoRA(rank=3)
    state = method.init(base, 0)
    coded, dense = Round(method, state, 1), Round(plain, state, 1)
    for seed, name in enumerate("ab"):
        member = Member(name, 3, 6.0)
        manifest, update = trained(method, state, seed)
        payload, back = sent(method, state, update, manifest)
        coded.add(member, payload, 2 + seed)
        dense.add(member, b"".join(plain.encode(back, manifest)), 2 + seed)
    assert digest(coded.close()) == digest(dense.close())


def test_feedback_is_refused_with_the_reason():
    with pytest.raises(ValidationError, match=r"uplink.feedback needs factors that go on from round to round"):
        TypeAdapter(FLoRA).validate_python({"uplink": {"codec": "int4", "feedback": True}})


def test_factors_that_are_not_finite_are_refused(base):
    method = FLoRA(rank=3, uplink=TERNARY)
    state = method.init(base, 0)
    manifest, update = trained(method, state)
    update[manifest.names[0]][0, 0] = np.nan
    with pytest.raises(WireError, match="finite"):
        list(method.encode(update, manifest))
