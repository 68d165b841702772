import numpy as np
import pytest
import torch

from fedtune.config.schema import DataConfig
from fedtune.errors import DataError
from fedtune.training.encoding import encode_rows, fork
from fedtune.training.packing import collate, pack
from fedtune.training.scoring import Scorer

_QA = DataConfig(prompt="q", response="a")
_CHAT = DataConfig(messages="m")
_TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def chatty(tokenizer):
    tokenizer.chat_template = _TEMPLATE
    yield tokenizer
    tokenizer.chat_template = None


def _learned(row, tokenizer) -> str:
    return tokenizer.decode(row.targets)


def test_only_the_answer_is_learned_and_its_end(tokenizer):
    row = encode_rows([{"q": "two and two?", "a": "four"}], tokenizer, _QA, 64)[0]
    assert tokenizer.decode(row.ids) == "two and two?\nfour<|end|>"
    assert _learned(row, tokenizer) == "four<|end|>"
    assert np.array_equal(row.ids[row.at + 1], row.targets)


def test_the_end_is_learned_though_it_is_the_padding_token_too(tokenizer):
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    for data, row in ((_QA, {"q": "a", "a": "b"}), (DataConfig(text="t"), {"t": "ab"})):
        assert encode_rows([row], tokenizer, data, 64)[0].targets[-1] == tokenizer.eos_token_id


def test_plain_text_is_learned_whole(tokenizer):
    row = encode_rows([{"t": "hello"}], tokenizer, DataConfig(text="t"), 64)[0]
    assert _learned(row, tokenizer) == "ello<|end|>"


def test_template_puts_the_prompt(tokenizer):
    data = DataConfig(prompt="q", response="a", template="Q: {prompt} A: ")
    row = encode_rows([{"q": "{x}", "a": "y"}], tokenizer, data, 64)[0]
    assert tokenizer.decode(row.ids) == "Q: {x} A: y<|end|>"


def test_chat_template_is_used_and_nothing_after_the_end_is_learned(chatty):
    row = encode_rows([{"q": "hi", "a": "ho"}], chatty, _QA, 64)[0]
    assert chatty.decode(row.ids) == "[user]hi<|end|>\n[assistant]ho<|end|>"
    assert _learned(row, chatty) == "ho<|end|>"


def test_only_the_assistants_turns_are_learned(chatty):
    turns = [("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four")]
    row = encode_rows([{"m": [{"role": r, "content": c} for r, c in turns]}], chatty, _CHAT, 99)[0]
    assert (
        chatty.decode(row.ids) == "[user]one<|end|>\n[assistant]two<|end|>\n[user]three<|end|>\n[assistant]four<|end|>"
    )
    assert _learned(row, chatty) == "two<|end|>four<|end|>"


def test_messages_without_a_chat_template(tokenizer):
    messages = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    row = encode_rows([{"m": messages}], tokenizer, _CHAT, 99)[0]
    assert tokenizer.decode(row.ids) == "user: one\nassistant: two\n<|end|>"
    assert _learned(row, tokenizer) == "two\n<|end|>"


def test_a_template_that_rewrites_earlier_turns_leaves_the_last_answer(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]"
        "{% if loop.last or m['role'] == 'user' %}{{ m['content'] }}{% else %}...{% endif %}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    turns = [("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four")]
    try:
        row = encode_rows([{"m": [{"role": r, "content": c} for r, c in turns]}], tokenizer, _CHAT, 99)[0]
    finally:
        tokenizer.chat_template = None
    assert tokenizer.decode(row.ids) == "[user]one<|end|>[assistant]...<|end|>[user]three<|end|>[assistant]four<|end|>"
    assert _learned(row, tokenizer) == "four<|end|>"


def test_a_long_prompt_loses_its_start_and_keeps_the_answer(tokenizer):
    row = encode_rows([{"q": "x" * 100 + "end", "a": "yes"}], tokenizer, _QA, 16)[0]
    assert len(row) == 16
    assert tokenizer.decode(row.ids) == "xxxxxxxxend\nyes<|end|>"
    assert _learned(row, tokenizer) == "yes<|end|>"


def test_a_long_answer_keeps_its_start_and_some_prompt(tokenizer):
    row = encode_rows([{"q": "question", "a": "y" * 100}], tokenizer, _QA, 16)[0]
    assert tokenizer.decode(row.ids) == "ion\n" + "y" * 12


def test_a_row_with_nothing_to_learn_is_named(tokenizer):
    with pytest.raises(DataError, match="row 2"):
        encode_rows([{"t": "fine"}, {"t": ""}], tokenizer, DataConfig(text="t"), 64)


def test_branches_of_a_fork_have_the_losses_of_rows_alone(llama, tokenizer):
    rows = [{"q": "which of them?", "a": answer} for answer in ("left", "right", "neither")]
    alone = encode_rows(rows, tokenizer, _QA, 64)
    tree = fork(alone)
    assert len(tree) < sum(map(len, alone))
    scorer = Scorer.probe(llama)
    with torch.no_grad():
        batch = collate([tree, *alone], pack([len(tree), *map(len, alone)], 64))
        losses = scorer(batch)
    for branch in (1, 2, 3):
        got = losses[torch.from_numpy((batch.rows == 0) & (batch.branches == branch))]
        want = losses[torch.from_numpy(batch.rows == branch)]
        assert torch.allclose(got, want, atol=1e-5)
