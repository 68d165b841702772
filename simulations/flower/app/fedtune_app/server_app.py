"""The coordinator's side."""

from fedtune.flower.server import server_app

app = server_app()
