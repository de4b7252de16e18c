"""Bits per byte, by windows that score every target once."""
