"""Checkpoints: written, kept, found again."""
