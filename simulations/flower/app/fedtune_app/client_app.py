"""A node's side. To train with a loop of your own: client_app(open_worker=...)."""

from fedtune.flower.client import client_app

app = client_app()
