"""Opening a run: what is refused at the start leaves nothing in the way of the run that is meant."""

import pytest
from fedtune_server.run import open_run

from fedtune.config import parse
from fedtune.errors import ConfigError


def test_a_method_that_is_refused_can_be_mended_in_the_same_folder(tmp_path, base_folder):
    def config(budget_kb):
        link = {"codec": "ternary", "budget_kb": budget_kb}
        sections = {"run": {"folder": str(tmp_path / "run")}, "model": {"name": str(base_folder)}}
        return parse({**sections, "data": {"name": "vader"}, "method": {"name": "flora", "uplink": link}})

    with pytest.raises(ConfigError, match=r"method\.uplink\.budget_kb"):
        open_run(config(0.01))
    run = open_run(config(50))
    assert run.version.number == 0
    run.close()
