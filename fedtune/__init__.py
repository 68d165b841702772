"""fedtune: fine-tune a language model together, on data that may not leave its owner."""

__version__ = "0.1.0"
