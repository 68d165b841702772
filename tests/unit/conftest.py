"""A toy base model for all unit tests."""

import pytest

from fedtune.base import open_base
from fedtune.testing import toy_base


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory):
    return toy_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def base(base_folder):
    return open_base(base_folder)
