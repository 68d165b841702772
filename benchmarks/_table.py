"""What every benchmark shares: interleaved timing, rows, the printed table, the JSON file."""

import argparse
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table. `peer` is the other way of doing the same work, `limit` what the machine allows at best."""

    work: str
    ours: float
    unit: str
    peer: float | None = None
    limit: float | None = None
    note: str = ""

    @property
    def ratio_to_peer(self) -> float | None:
        """How many times more the peer takes."""
        return self.peer / self.ours if self.peer and self.ours else None

    @property
    def ratio_to_limit(self) -> float | None:
        """How many times more than the limit ours takes."""
        return self.ours / self.limit if self.limit else None

    def to_json(self) -> dict[str, object]:
        """The row as it is written to a file."""
        ratios = {"ratio_to_peer": self.ratio_to_peer, "ratio_to_limit": self.ratio_to_limit}
        return {key: _rounded(value) for key, value in {**asdict(self), **ratios}.items()}


def options(description: str, **extra: dict[str, object]) -> argparse.Namespace:
    """Parses `--quick`, `--json` and the benchmark's own `extra` arguments."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="a smaller version, within 40 seconds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to FILE")
    for name, settings in extra.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **settings)
    return parser.parse_args()


def interleave(
    variants: Mapping[str, Callable[[], object]], repeats: int, clock: Callable[[], float] = time.process_time
) -> dict[str, float]:
    """Runs all variants in turn, `repeats` times; returns the least time of each in seconds: process CPU time."""
    best = dict.fromkeys(variants, float("inf"))
    for _ in range(repeats):
        for name, run in variants.items():
            before = clock()
            run()
            best[name] = min(best[name], clock() - before)
    return best


def report(title: str, rows: list[Row], file: Path | None = None) -> None:
    """Prints the table, and writes it as JSON when asked to."""
    print(f"\n## {title}\n")
    print(table(rows))
    if file:
        file.write_text(json.dumps([row.to_json() for row in rows], indent=1) + "\n")


def table(rows: list[Row]) -> str:
    """Formats rows as a Markdown table."""
    lines = [("work", "ours", "peer", "limit", "unit", "peer/ours", "ours/limit", "note")]
    for row in rows:
        numbers = (row.ours, row.peer, row.limit)
        ratios = (row.ratio_to_peer, row.ratio_to_limit)
        lines.append((row.work, *map(_text, numbers), row.unit, *map(_text, ratios), row.note))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    lines.insert(1, tuple("-" * width for width in widths))
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines)


def _text(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def _rounded(value: object) -> object:
    return float(f"{value:.4g}") if isinstance(value, float) else value
