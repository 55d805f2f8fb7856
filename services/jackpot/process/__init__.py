"""What each process of a job does from its start to its end."""
