"""`fedtune train`."""


def train() -> None:
    """Placeholder."""
