"""Configuration: one TOML file, validated whole before anything heavy is loaded."""

from fedtune.config.load import load, parse
from fedtune.config.schema import Config
from fedtune.config.shared import Shared

__all__ = ["Config", "Shared", "load", "parse"]
