"""Messages generated from `proto/fedtune/wire/v1`; `proto/generate.py` writes them, a test proves them fresh."""
