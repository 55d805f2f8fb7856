"""The demo: a task that fits in a line, and two tiny models made for it on the spot."""
