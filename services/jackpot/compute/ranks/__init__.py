"""Several processes that compute together: meeting, sharding, and dividing the work."""
