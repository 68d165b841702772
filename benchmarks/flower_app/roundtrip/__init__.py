"""The same round in Flower: arrays go out, come back changed, and are averaged."""
