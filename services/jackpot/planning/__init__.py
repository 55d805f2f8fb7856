"""Estimates a job's cost: memory, arithmetic, bytes and time, computed from its settings. Nothing is measured here."""
