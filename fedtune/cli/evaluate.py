"""`fedtune evaluate`."""


def evaluate() -> None:
    """Placeholder."""
