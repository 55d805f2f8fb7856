"""What a job will cost: memory, arithmetic, bytes and time, computed from its settings. Nothing is measured here."""
