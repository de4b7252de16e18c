"""Parameter golf: train, average, quantize, write, read back and score a small language model."""
