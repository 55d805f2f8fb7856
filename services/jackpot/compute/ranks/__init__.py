"""Several processes that compute together: rendezvous, sharding, and division of work."""
