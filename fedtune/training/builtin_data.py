"""Data sets that packages carry, for machines that reach no hub: read at run time, kept nowhere else.

vader      23,703 sentences with human ratings of sentiment    (Hutto & Gilbert, ICWSM 2014)
chitchat   people's turns in 7,000 chats, 1,113 people         (BYU-PCCL Chit-Chat challenge)
topics     paragraphs of Python's own help, always there
"""

import html
import io
import json
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pydoc_data.topics import topics

from fedtune.errors import DataError, problem
from fedtune.training.cache import Package, fetch
from fedtune.training.rows import Row

_VADER = Package(
    "vaderSentiment", "3.3.2", "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9", source=True
)
_CHITCHAT = Package("chitchat-dataset", "0.9.0", "7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e")
_DOMAINS = {"tweets": "tweets", "movieReviewSnippets": "movies", "amazonReviewSnippets": "products"} | {
    "nytEditorialSnippets": "editorials"
}
_QUESTION = "Is the sentiment of this sentence negative, neutral or positive?\n"
# Turns of the conversation before an answer that are shown with it.
_HISTORY = 5
_PARAGRAPH = 200


@dataclass(frozen=True, slots=True)
class BuiltIn:
    """A data set: how it is read, the columns used when a configuration names none, and what splits it.

    `groups` are columns whose values must not be on both sides of a held-out split; whole values of the first are
    held out.
    """

    read: Callable[[], list[Row]]
    columns: dict[str, str]
    groups: tuple[str, ...] = ()


def read_vader() -> list[Row]:
    """Sentences with `label` (negative, neutral, positive: cut at -0.5 and 0.5), `domain`, `document`, `rating`.

    `prompt` and `response` put the label as a question.
    """
    with tarfile.open(fetch(_VADER)) as package:
        inner = _member(package, "hutto_ICWSM_2014.tar.gz")
    rows: list[Row] = []
    with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
        for file, domain in _DOMAINS.items():
            rows += _vader_rows(_member(archive, f"{file}_GroundTruth.txt").decode("utf-8", "replace"), domain)
    return rows


def read_chitchat() -> list[Row]:
    """Each turn as `response` to the turns before it (`prompt`), with its `sender` and `conversation`."""
    with zipfile.ZipFile(fetch(_CHITCHAT)) as wheel:
        chats = json.loads(wheel.read("chitchat_dataset/dataset.json"))
    return [row for name, chat in chats.items() for row in _chat_rows(name, chat["messages"])]


def read_topics() -> list[Row]:
    """Paragraphs of Python's help as `text`, with their `topic`."""
    # Some topics repeat others' words: a paragraph is kept where it comes first.
    parts = {part: name for name in sorted(topics, reverse=True) for part in _paragraphs(topics[name])}
    return [{"text": part, "topic": name} for part, name in sorted(parts.items(), key=lambda item: item[1])]


def _member(archive: tarfile.TarFile, ending: str) -> bytes:
    name = next((name for name in archive.getnames() if name.endswith(ending)), None)
    stream = archive.extractfile(name) if name else None
    if stream is None:
        raise DataError(problem("package", f"an archive with {ending}", "none"))
    return stream.read()


def _vader_rows(text: str, domain: str) -> Iterator[Row]:
    for line in text.splitlines():
        number, rating, sentence = line.split("\t", 2)
        label = "negative" if float(rating) < -0.5 else "positive" if float(rating) > 0.5 else "neutral"
        sentence = html.unescape(html.unescape(sentence)).strip()  # some were escaped twice
        yield {
            "text": sentence,
            "label": label,
            "domain": domain,
            "document": f"{domain}-{number.split('_')[0]}",
            "rating": float(rating),
            "prompt": _QUESTION + sentence,
            "response": label,
        }


def _chat_rows(name: str, turns: list[list[dict[str, str]]]) -> Iterator[Row]:
    said = [" ".join(part["text"].strip() for part in turn).strip() for turn in turns]
    for i in range(1, len(turns)):
        before = [text for text in said[max(0, i - _HISTORY) : i] if text]
        if not (said[i] and before):
            continue
        yield {
            "prompt": "\n".join(before),
            "response": said[i],
            "sender": turns[i][0]["sender"],
            "conversation": name,
        }


def _paragraphs(text: str) -> Iterator[str]:
    """Joins blocks between empty lines until they are long enough to learn from."""
    held = ""
    for block in text.split("\n\n"):
        held = f"{held}\n\n{block.strip()}".strip()
        if len(held) >= _PARAGRAPH:
            yield held
            held = ""
    if held:
        yield held


BUILT_IN: dict[str, BuiltIn] = {
    "vader": BuiltIn(
        read_vader,
        {"prompt": "prompt", "response": "response", "label": "label", "client_key": "domain"},
        ("document",),
    ),
    "chitchat": BuiltIn(
        read_chitchat, {"prompt": "prompt", "response": "response", "client_key": "sender"}, ("sender", "conversation")
    ),
    "topics": BuiltIn(read_topics, {"text": "text", "client_key": "topic", "label": "topic"}, ()),
}
