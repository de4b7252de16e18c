"""Text on disk to batches on a device: shards, tokenizer, loader, validation text, demo corpus, download."""
