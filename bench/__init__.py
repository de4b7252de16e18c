"""How fast everything is, how near the hardware's limit, and compared with what."""
