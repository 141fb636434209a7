"""Processes that really save, delete and collect in one store, and are really killed and stopped meanwhile."""
