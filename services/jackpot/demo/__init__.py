"""The demo: a task understood at a glance, and tiny models made for it by a supervised warm-up."""
