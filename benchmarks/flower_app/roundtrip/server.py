"""Flower's own FedAvg; the only addition is a line with the time whenever a round has been averaged."""

import json
import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


class TimedFedAvg(FedAvg):
    """FedAvg that writes down when a round starts and ends."""

    log = ""

    def configure_train(self, server_round, *rest):
        messages = list(super().configure_train(server_round, *rest))
        self._note("started", server_round, len(messages))
        return messages

    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        result = super().aggregate_train(server_round, replies)
        self._note("closed", server_round, sum(not reply.has_error() for reply in replies))
        return result

    def _note(self, event, server_round, clients):
        with Path(self.log).open("a") as file:
            file.write(
                json.dumps({"event": event, "round": server_round, "time": time.time(), "clients": clients}) + "\n"
            )


@app.main()
def main(grid, context):
    config = context.run_config
    clients, count = int(config["clients"]), int(config["arrays"])
    size = int(config["megabytes"] * 1e6 / 4 / count)
    rng = np.random.default_rng(0)
    arrays = ArrayRecord({f"a{i:03d}": Array(rng.normal(size=size).astype(np.float32)) for i in range(count)})
    strategy = TimedFedAvg(fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients)
    strategy.log = str(config["log"])
    strategy.start(grid=grid, initial_arrays=arrays, num_rounds=int(config["rounds"]))
