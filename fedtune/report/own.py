"""What clients measured on rows of their own: the model each works with, what is personal to it included."""

from collections.abc import Mapping
from statistics import fmean, pstdev

FIGURES = ("own_loss_before", "own_loss", "own_accuracy_before", "own_accuracy")


def own_figures(metrics: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Gathers a round's figures over its clients, every client counting the same.

    Args:
        metrics: what each client reported.

    Returns:
        For each figure that was reported: `mean`, `spread` (standard deviation over clients), `least`, `most` and the
        number of `clients`.
    """
    found = {name: [m[name] for m in metrics.values() if name in m] for name in FIGURES}
    return {
        name.removeprefix("own_"): {
            "mean": fmean(values),
            "spread": pstdev(values),
            "least": min(values),
            "most": max(values),
            "clients": float(len(values)),
        }
        for name, values in found.items()
        if values
    }
