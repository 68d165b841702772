"""Rows to tokens: what the model reads, and which of its predictions are learned.

    text       every token after the first
    prompt     only the answer; through the tokenizer's chat template when it has one, else `data.template`
    messages   only the assistant's turns

What is learned is a list of places, never a property of a token: the padding token is often the end token too, and
masking by its id would lose the ends of answers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from fedtune.config.schema import DataConfig
from fedtune.errors import DataError, problem

Row: TypeAlias = Mapping[str, Any]
Ints: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Encoded:
    """One row as tokens. T tokens, M of them learned.

    Attributes:
        ids: tokens (T,).
        at: places whose prediction is learned (M,).
        targets: token each of those places should predict (M,).
        positions: place of each token in its own text (T,).
        branches: 0 for the trunk, which all branches see; k > 0 for branch k, which only itself sees (T,).
        target_branches: branch of each target (M,).
    """

    ids: Ints
    at: Ints
    targets: Ints
    positions: Ints
    branches: Ints
    target_branches: Ints

    @classmethod
    def plain(cls, ids: Sequence[int], learned: Sequence[bool]) -> "Encoded":
        """One text; `learned` says of each token whether it is to be predicted. The first never is."""
        tokens = np.asarray(ids, np.int64)
        places = np.flatnonzero(np.asarray(learned, bool)[1:])
        trunk = np.zeros(len(tokens), np.int64)
        return cls(tokens, places, tokens[places + 1], np.arange(len(tokens)), trunk, trunk[: len(places)])

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class _Piece:
    text: str
    learned: bool


def encode_rows(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, data: DataConfig, max_length: int
) -> list[Encoded]:
    """Encodes rows that have the columns `data` names (see `fedtune.training.data`).

    Args:
        rows: the rows.
        tokenizer: the model's.
        data: which columns hold what; `text`, `prompt` with `response`, or `messages`.
        max_length: longer rows are cut: an answer keeps its start, and as much of the end of its prompt as fits.

    Raises:
        DataError: a row in which nothing is left to learn.
    """
    cut = [_pieces(row, tokenizer, data) for row in rows]
    texts = [piece.text for pieces in cut for piece in pieces]
    tokens = iter(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else [])
    encoded = []
    for number, pieces in enumerate(cut, 1):
        parts = [(list(next(tokens)), piece.learned) for piece in pieces]
        encoded.append(_join(parts, tokenizer, max_length, chat=not data.text))
        if not len(encoded[-1].at):
            raise DataError(problem(f"row {number}", "something to learn after cutting", "nothing"))
    return encoded


def fork(options: Sequence[Encoded]) -> Encoded:
    """Joins encodings of one prompt with different answers into a tree: the prompt once, a branch for each answer.

    Long rows keep the end of their prompt; the shortest one kept is kept for all.
    """
    prompts = [option.ids[: option.at[0] + 1] for option in options]
    prompt = min(prompts, key=len)
    place = len(prompt)
    parts: list[list[Ints]] = [[prompt], [], [], [np.arange(place)], [np.zeros(place, np.int64)], []]
    length = place
    for branch, option in enumerate(options, 1):
        answer = option.ids[option.at[0] + 1 :]
        inside = option.at[1:] - option.at[0] - 1 + length
        count = len(option.at)
        new = answer, np.array([place - 1, *inside]), option.targets, place + np.arange(len(answer))
        for part, piece in zip(parts, (*new, np.full(len(answer), branch), np.full(count, branch)), strict=True):
            part.append(piece)
        length += len(answer)
    return Encoded(*(np.concatenate(part) for part in parts))


def _pieces(row: Row, tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> list[_Piece]:
    """Cuts a row into stretches that are learned and stretches that are only read."""
    if data.text:
        return [_Piece(str(row[data.text]), True)]
    if data.messages:
        messages = [{"role": str(m["role"]), "content": str(m["content"])} for m in row[data.messages]]
    else:
        messages = [
            {"role": "user", "content": str(row[data.prompt])},
            {"role": "assistant", "content": str(row[data.response])},
        ]
    if tokenizer.chat_template:
        return _chat(messages, tokenizer)
    if data.messages:
        return [_Piece(*part) for m in messages for part in _spoken(m["role"], m["content"])]
    return [_Piece(data.template.format(prompt=row[data.prompt]), False), _Piece(str(row[data.response]), True)]


def _spoken(role: str, content: str) -> list[tuple[str, bool]]:
    """How a message is put for a tokenizer that knows no chats."""
    return [(f"{role}: ", False), (f"{content}\n", role == "assistant")]


def _chat(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[_Piece]:
    """Cuts the rendered chat at the assistant's turns, by rendering its beginnings."""
    pieces: list[_Piece] = []
    done = ""
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = tokenizer.apply_chat_template(messages[:number], tokenize=False, add_generation_prompt=True)
        full = tokenizer.apply_chat_template(messages[: number + 1], tokenize=False)
        if not prompt.startswith(done) or not full.startswith(prompt):
            # The template rewrites earlier turns: only the last answer is what the model would be asked for.
            pieces, done = [], ""
        if not full.startswith(prompt):
            prompt = full[: full.rfind(message["content"])]
        pieces += [_Piece(prompt[len(done) :], False), _Piece(_ended(full[len(prompt) :], tokenizer), True)]
        done = prompt + pieces[-1].text
    return pieces


def _ended(answer: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Drops what a template puts behind the end token: a model stops there."""
    end = tokenizer.eos_token
    return answer[: answer.rfind(end) + len(end)] if end and end in answer else answer


def _join(
    parts: list[tuple[list[int], bool]], tokenizer: PreTrainedTokenizerBase, max_length: int, chat: bool
) -> Encoded:
    ids = [token for tokens, _ in parts for token in tokens]
    learned = [flag for tokens, flag in parts for _ in tokens]
    end, start = tokenizer.eos_token_id, tokenizer.bos_token_id
    if end is not None and learned and learned[-1] and ids[-1] != end:
        ids, learned = [*ids, end], [*learned, True]
    if not (chat and tokenizer.chat_template) and start is not None and start != end and ids[:1] != [start]:
        ids, learned = [start, *ids], [False, *learned]
    if len(ids) > max_length:
        ids, learned = _cut(ids, learned, max_length)
    return Encoded.plain(ids, learned)


def _cut(ids: list[int], learned: list[bool], max_length: int) -> tuple[list[int], list[bool]]:
    """Cuts a row: text and answers keep their start, prompts their end."""
    first = learned.index(True) if True in learned else 0
    answer = len(ids) - first
    # At least a quarter of the room, and one token, stays for the prompt.
    keep = min(first, max(max_length - answer, max_length // 4, 1))
    begin = first - keep
    return ids[begin : begin + max_length], learned[begin : begin + max_length]
