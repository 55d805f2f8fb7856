"""Studies: one job under several settings and seeds, and what can be said about the difference."""
