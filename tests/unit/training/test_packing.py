import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedtune.config.schema import DataConfig
from fedtune.training.encoding import Encoded, encode_rows
from fedtune.training.packing import Batch, Plan, Stem, collate, pack, rest_lengths
from fedtune.training.scoring import Scorer, visible

_QA = DataConfig(prompt="q", response="a", template="Answer in a word: {prompt}\n")


def _rows(tokenizer, count: int = 12, seed: int = 0) -> list[Encoded]:
    rng = np.random.default_rng(seed)
    words = ["red", "seventeen", "a", "mountain", "ox"]
    rows = [{"q": " ".join(rng.choice(words, rng.integers(1, 9))), "a": str(rng.choice(words))} for _ in range(count)]
    return encode_rows(rows, tokenizer, _QA, 128)


def _alone(model, rows: list[Encoded]) -> list[torch.Tensor]:
    """The model's own logits for each row by itself: the slow way, with nothing of ours but the row."""
    losses = []
    for row in rows:
        logits = model(input_ids=torch.from_numpy(row.ids)[None]).logits[0]
        predicted = torch.log_softmax(logits.double(), -1)[torch.from_numpy(row.at)]
        losses.append(-predicted[torch.arange(len(row.at)), torch.from_numpy(row.targets)])
    return losses


def _by_row(losses: torch.Tensor, batch: Batch, count: int) -> list[torch.Tensor]:
    return [losses[torch.from_numpy(batch.rows == i)].double() for i in range(count)]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("with_stem", [False, True])
def test_packed_rows_have_the_losses_of_rows_alone(kind, with_stem, request, tokenizer):
    model, rows = request.getfixturevalue(kind), _rows(tokenizer)
    scorer = Scorer.probe(model)
    assert scorer.packs
    assert scorer.short_head
    stem = Stem.of(rows) if with_stem else Stem.none(len(rows))
    packs = pack(rest_lengths(rows, stem), 128 - len(stem.ids))
    assert len(packs) < len(rows) / 2
    with torch.no_grad():
        batch = collate(rows, packs, stem)
        packed = _by_row(scorer(batch), batch, len(rows))
        for got, want in zip(packed, _alone(model, rows), strict=True):
            assert torch.allclose(got, want, atol=1e-5, rtol=1e-5)


def test_gradients_of_packed_rows_are_those_of_rows_alone(llama, tokenizer):
    rows = _rows(tokenizer)
    weight = llama.get_submodule("model.layers.0.self_attn.q_proj").weight.requires_grad_(True)
    scorer, stem = Scorer.probe(llama), Stem.of(rows)
    scorer(collate(rows, pack(rest_lengths(rows, stem), 90), stem)).sum().backward()
    packed, weight.grad = weight.grad, None
    torch.cat(_alone(llama, rows)).sum().backward()
    assert torch.allclose(packed, weight.grad.float(), atol=1e-5, rtol=1e-3)


def test_the_stem_is_what_the_template_puts_before_every_row(tokenizer):
    stem = Stem.of(_rows(tokenizer))
    assert tokenizer.decode(stem.ids) == "Answer in a word: "
    assert all(stem.shared)


def test_a_row_that_begins_otherwise_is_packed_whole(llama, tokenizer):
    odd = encode_rows([{"q": "x", "a": "y"}], tokenizer, DataConfig(prompt="q", response="a", template="{prompt}?"), 99)
    rows = [*_rows(tokenizer), *odd]
    stem = Stem.of(rows)
    assert stem.shared == (True,) * 12 + (False,)
    with torch.no_grad():
        batch = collate(rows, [list(range(13))], stem)
        got = _by_row(Scorer.probe(llama)(batch), batch, 13)[12]
    assert torch.allclose(got, _alone(llama, odd)[0], atol=1e-5)


def test_plain_text_has_no_stem(tokenizer):
    rows = encode_rows([{"t": "same start, other end"}, {"t": "same start, end"}], tokenizer, DataConfig(text="t"), 64)
    assert len(Stem.of(rows).ids) <= 1


def test_no_token_sees_another_row_or_the_future(tokenizer):
    rows = _rows(tokenizer)
    stem = Stem.of(rows)
    batch = collate(rows, [[0, 1, 2], [3]], stem)
    mask = visible(batch)[:, 0].numpy()
    assert not np.triu(mask, 1).any(axis=(1, 2)).any()
    first, second = (np.flatnonzero(batch.blocks[0] == block) for block in (2, 3))
    assert not mask[0][np.ix_(second, first)].any()
    assert mask[0][np.ix_(second, np.arange(len(stem.ids)))].all()
    padding = np.flatnonzero(batch.blocks[1] == 0)
    assert len(padding)
    assert not mask[1][np.ix_(np.flatnonzero(batch.blocks[1]), padding)].any()
    assert mask.any(axis=2).all()


@given(st.lists(st.integers(1, 64), min_size=1, max_size=200), st.integers(0, 2**32))
def test_every_row_is_in_exactly_one_sequence_and_fits(lengths, seed):
    packs = pack(lengths, 64, np.random.default_rng(seed))
    assert sorted(i for members in packs for i in members) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in members) <= 64 for members in packs)


def test_short_rows_fill_sequences():
    lengths = np.clip(np.random.default_rng(0).lognormal(3.4, 0.5, 500), 4, 128).astype(int).tolist()
    assert sum(lengths) / (len(pack(lengths, 256)) * 256) > 0.95


def _signature(plan: Plan, seed: int) -> list[bytes]:
    steps, stream = plan.batches(seed)
    batches = list(stream)
    assert len(batches) == steps
    return [part.ids.tobytes() for parts in batches for part in parts]


def test_batches_are_a_function_of_the_seed(tokenizer):
    plan = Plan(_rows(tokenizer, 40), 128, True, 2, 9)
    assert _signature(plan, 1) == _signature(plan, 1)
    assert _signature(plan, 1) != _signature(plan, 2)


def test_epochs_see_every_row_that_often(tokenizer):
    rows = _rows(tokenizer, 40)
    for packing in (False, True):
        _, stream = Plan(rows, 128, packing, 4, 0, epochs=1).batches(3)
        seen = np.concatenate([np.unique(part.rows) for parts in stream for part in parts])
        assert set(seen.tolist()) == set(range(40))


def test_few_rows_make_small_batches_and_no_row_is_twice_in_one(tokenizer):
    steps, stream = Plan(_rows(tokenizer, 3), 128, False, 8, 5).batches(0)
    assert steps == 5
    for parts in stream:
        assert sorted(np.unique(parts[0].rows)) == [0, 1, 2]


def test_parts_hold_what_the_whole_holds(tokenizer):
    rows = _rows(tokenizer, 40)
    whole = [parts[0] for parts in Plan(rows, 128, False, 8, 3).batches(7)[1]]
    cut = list(Plan(rows, 128, False, 8, 3, parts=3).batches(7)[1])
    for batch, parts in zip(whole, cut, strict=True):
        assert len(parts) == 3
        assert np.array_equal(batch.targets, np.concatenate([part.targets for part in parts]))
