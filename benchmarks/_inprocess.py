"""The same rounds in one process: `fedtune.simulation.simulate` with workers that train nothing."""

import json
import sys
import time
from pathlib import Path

from _clients import NoWorker

from fedtune.base import open_base
from fedtune.config import load
from fedtune.config.members import member_ids
from fedtune.method import Member
from fedtune.simulation import RoundResult, simulate


def main(file: Path) -> None:
    config = load(file)
    folder = Path(config.model.name)
    ids = member_ids(config)
    log = file.parent / "rounds.jsonl"

    def note(result: RoundResult) -> None:
        with log.open("a") as stream:
            stream.write(json.dumps({"event": "round_closed", "round": result.number, "time": time.time()}) + "\n")

    workers = {name: NoWorker(folder, index) for index, name in enumerate(ids)}
    members = [Member(name) for name in ids]
    simulate(config.method, open_base(folder), members, lambda m: workers[m.id], config.rounds.count, 0, note)
    time.sleep(5)  # the memory of a process that has ended cannot be read


if __name__ == "__main__":
    main(Path(sys.argv[1]))
