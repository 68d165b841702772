"""What every command prints with, and how numbers are written for people."""

import sys

from rich.console import Console

_PLAIN_WIDTH = 100

out = Console(highlight=False, width=None if sys.stdout.isatty() else _PLAIN_WIDTH)
err = Console(stderr=True, highlight=False)


def complain(message: str) -> None:
    """Prints an error on stderr, as it is: square brackets in it are no markup, and long lines are not cut."""
    err.print("error:", style="bold red", end=" ")
    err.print(message, markup=False, soft_wrap=True)


def size(nbytes: float) -> str:
    """Writes a number of bytes: `1.9 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(nbytes) < 1000:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"


def duration(seconds: float) -> str:
    """Writes a length of time: `8.2 s`, `3 min 05 s`, `2 h 07 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def figure(value: float | None, digits: int = 4) -> str:
    """Writes a loss or an accuracy; a dash when there is none."""
    return "–" if value is None else f"{value:.{digits}f}"
