"""The errors that programs name in their logs: `error: what`, of a client with its name before it."""

import re
from collections.abc import Iterable
from pathlib import Path

from fedtune.report.events import Tail

_ERROR = re.compile(r"(?:(\S+): )?(?:error: |(?=unexpected error: ))(.+)")
_SHOWN = 4


class Complaints:
    """Reads the errors that are added to a log, from its end on as it is now; it need not exist yet."""

    def __init__(self, log: Path) -> None:
        self._tail = Tail(log, from_end=True)

    def read(self) -> list[str]:
        """Returns the new ones, `client: what`."""
        return errors(line.decode(errors="replace") for line in self._tail.lines())


def errors(lines: Iterable[str]) -> list[str]:
    """Returns each error once, with the names of those who met it; lines that go on with it stay with it."""
    told: list[tuple[str, list[str]]] = []  # a client or nobody, and the lines of its error
    goes_on = False
    for line in lines:
        if found := _ERROR.match(line):
            told.append((found[1] or "", [found[2]]))
            goes_on = True
        elif goes_on := goes_on and _belongs(line, told[-1][0]):
            told[-1][1].append(line)
    named: dict[str, set[str]] = {}
    for name, text in told:
        named.setdefault("\n".join(text), set()).add(name)
    shown = [f"{', '.join(sorted(names))}: {text}".removeprefix(": ") for text, names in named.items()]
    return [*shown[:_SHOWN], f"and {len(shown) - _SHOWN} more"] if len(shown) > _SHOWN else shown


def _belongs(line: str, client: str) -> bool:
    """Whether a line belongs to the error before it: among the lines of several clients, one that is indented."""
    return not line.startswith("{") and (not client or line.startswith(" "))
