"""Weights on their way to the replicas."""
