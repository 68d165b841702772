"""Figures of clients' own rows."""

import pytest

from fedtune.report.own import own_figures


def test_every_client_counts_the_same_and_those_who_measured_nothing_do_not():
    metrics = {"a": {"loss": 9.0, "own_loss": 1.0, "own_loss_before": 4.0}, "b": {"own_loss": 3.0}, "c": {"loss": 2.0}}
    found = own_figures(metrics)
    assert found["loss"] == {"mean": 2.0, "spread": 1.0, "least": 1.0, "most": 3.0, "clients": 2.0}
    assert found["loss_before"]["mean"] == 4.0
    assert found["loss_before"]["spread"] == 0.0
    assert "accuracy" not in found


@pytest.mark.parametrize("metrics", [{}, {"a": {}}, {"a": {"loss": 1.0}}])
def test_nothing_measured_is_nothing_reported(metrics):
    assert own_figures(metrics) == {}
