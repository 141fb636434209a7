"""How fast, how small, how much memory: each figure that the project claims is printed by one command."""
