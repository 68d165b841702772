"""The template and the reference page are the schema, written out: nothing is left out and every default is right."""

import re
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest

from fedtune.config import Config, parse
from fedtune.config.template import demo, described, keys, own_data, reference, section_type, sections, template
from fedtune.methods import METHODS

DOCS = Path(__file__).parents[3] / "docs"
NO_DEFAULT = '= "file.pem"'  # files that are not there unless somebody gives them


def test_every_key_of_the_schema_is_in_the_template() -> None:
    text = template({})
    for section in sections():
        body = re.search(rf"^\[{section}\](.*?)(?=^\[|\Z)", text, re.M | re.S)
        assert body, section
        names = {field.name for field in fields(section_type(section))} | ({"name"} if section == "method" else set())
        assert set(re.findall(r"^#?(\w+) = ", body[1], re.M)) == names


def test_uncommenting_everything_gives_the_defaults() -> None:
    lines = [line for line in template({}).splitlines() if NO_DEFAULT not in line]
    live = "\n".join(re.sub(r"^#(\w+ = )", r"\1", line) for line in lines)
    assert parse(tomllib.loads(live)) == Config()


def test_an_untouched_template_is_the_defaults() -> None:
    assert parse(tomllib.loads(template({}))) == Config()


def test_the_demo_template_is_the_demo() -> None:
    config = parse(tomllib.loads(template(demo())))
    assert config == parse(demo())
    assert config.simulation.ranks == (16, 8, 8, 4)


def test_a_template_for_own_data_names_file_and_columns() -> None:
    config = parse(tomllib.loads(template(own_data(Path("a b.jsonl"), {"prompt": "q", "response": "a"}))))
    assert (config.data.name, config.data.prompt, config.data.response) == ("a b.jsonl", "q", "a")


@pytest.mark.parametrize("section", [field.name for field in fields(Config)])
def test_every_key_is_described(section: str) -> None:
    assert [key.name for key in keys(section) if not key.text] == []
    kinds = METHODS.values() if section == "method" else [section_type(section)]
    for kind in kinds:
        assert set(described(kind)) == {field.name for field in fields(kind)}, (
            "a description of a key that is not there"
        )


def test_the_reference_page_is_fresh() -> None:
    assert (DOCS / "configuration.md").read_text() == reference(), "the page says at its top how it is made"
