"""The life of a job's processes, from start to exit."""
