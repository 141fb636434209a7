"""Ways into other programs' checkpointing. Each is a module of its own, and imports its package by itself."""
