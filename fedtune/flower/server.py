"""The ServerApp: reads the run config, opens the base model without torch, and starts the strategy."""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedtune.base import open_base
from fedtune.config import Config, Shared
from fedtune.flower.record import RunFolder
from fedtune.flower.settings import read_config
from fedtune.flower.strategy import FedtuneStrategy
from fedtune.hub import find_model


def server_app() -> ServerApp:
    """Makes the ServerApp of a fedtune run; everything else is in `--run-config`."""
    app = ServerApp()

    def main(grid: Grid, context: Context) -> None:
        run(read_config(context.run_config), grid)

    app.main()(main)
    return app


def run(config: Config, grid: Grid) -> FedtuneStrategy:
    """Runs a configuration on a grid, for a ServerApp of one's own; returns the strategy, which holds the state.

    Raises:
        FedtuneError: the run did not complete.
    """
    model = config.model
    base = open_base(find_model(model.name, model.revision), model.name)
    strategy = FedtuneStrategy(config, base, RunFolder(config.run.folder, Shared.of(config)))
    strategy.start(grid)
    return strategy
