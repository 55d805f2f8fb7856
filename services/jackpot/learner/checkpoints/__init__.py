"""Checkpoints: writing, keeping and finding them."""
