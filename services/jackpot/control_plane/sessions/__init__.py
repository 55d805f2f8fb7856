"""One session of a job, from its preparation to its summary."""
