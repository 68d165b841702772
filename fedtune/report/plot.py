"""`report.png`: three panels from a report. Held-out loss by round, bytes by round, training loss of each client."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK, _BLUE, _ORANGE, _GREY = "#22262b", "#1f6fb4", "#d9822b", "#9aa3ad"
_MAX_NAMED = 8


def plot_report(report: dict[str, Any], path: Path) -> Path:
    """Draws a federated report as PNG and returns its path; needs matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.8), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(_title(report), fontsize=11, color=_INK, x=0.01, ha="left")
    held_out, traffic, clients = figure.subplots(1, 3)
    _held_out(held_out, report)
    _traffic(traffic, report["rounds"])
    _clients(clients, report["rounds"])
    for axes in (held_out, traffic, clients):
        _tidy(axes)
    figure.savefig(path)
    return path


def _held_out(axes: "Axes", report: dict[str, Any]) -> None:
    points = [(r["round"], r["held_out"]["loss"]) for r in report["rounds"] if r["held_out"]]
    base = report["held_out"]["base"]
    if base:
        points.insert(0, (0, base["loss"]))
        axes.axhline(base["loss"], color=_GREY, linestyle="--", linewidth=1, label="base model")
    if points:
        axes.plot(*zip(*points, strict=True), color=_BLUE, marker="o", markersize=4, label="federated")
        axes.annotate(f"{points[-1][1]:.3f}", points[-1], xytext=(4, 8), textcoords="offset points", ha="right")
        axes.margins(y=0.15)
        axes.legend(frameon=False)
    else:
        _nothing(axes, "not evaluated")
    axes.set(title="Held-out loss", xlabel="round", ylabel="nats per token")


def _traffic(axes: "Axes", rounds: list[dict[str, Any]]) -> None:
    numbers = [r["round"] for r in rounds]
    scale, unit = _unit(max((r[key] for r in rounds for key in ("bytes_up", "bytes_down")), default=0))
    for offset, key, color, label in ((-0.2, "bytes_up", _BLUE, "up"), (0.2, "bytes_down", _ORANGE, "down")):
        axes.bar([n + offset for n in numbers], [r[key] / scale for r in rounds], 0.4, color=color, label=label)
    if rounds:
        axes.legend(frameon=False)
    else:
        _nothing(axes, "no round closed")
    axes.set(title="Traffic, all clients together", xlabel="round", ylabel=unit)


def _clients(axes: "Axes", rounds: list[dict[str, Any]]) -> None:
    names = sorted({client for r in rounds for client in r["client_loss"]})
    for name in names:
        points = [(r["round"], r["client_loss"][name]) for r in rounds if name in r["client_loss"]]
        style = {"label": name} if len(names) <= _MAX_NAMED else {"color": _GREY, "alpha": 0.6}
        axes.plot(*zip(*points, strict=True), marker=".", linewidth=1, **style)
    means = [(r["round"], r["train_loss"]) for r in rounds if r["train_loss"] is not None]
    if means:
        axes.plot(*zip(*means, strict=True), color=_INK, linewidth=2, label="weighted mean")
        axes.legend(frameon=False, fontsize=8)
    else:
        _nothing(axes, "no client reported a loss")
    axes.set(title="Training loss", xlabel="round", ylabel="nats per token")


def _tidy(axes: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator

    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color="#e6e9ec", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.title.set(fontsize=10, color=_INK)


def _nothing(axes: "Axes", text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=_GREY)


def _title(report: dict[str, Any]) -> str:
    settings = report.get("settings", {})
    parts = [report["name"], settings.get("method", {}).get("name"), settings.get("model", {}).get("name")]
    return " · ".join(str(part) for part in [*parts, f"{len(report['clients'])} clients", report["outcome"]] if part)


def _unit(largest: float) -> tuple[float, str]:
    for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if largest >= scale:
            return scale, unit
    return 1.0, "bytes"
