"""Codecs: arrays to bytes and back, pure functions without I/O."""
