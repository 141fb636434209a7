"""Faults of other ways to keep checkpoints, each reproduced beside ckptstore: run, not claimed."""
