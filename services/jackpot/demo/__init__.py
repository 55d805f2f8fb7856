"""The demo: a task that fits in a line, and two tiny models trained for it locally."""
