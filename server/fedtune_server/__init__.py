"""The coordinator of a federated run. It imports neither torch nor transformers."""
