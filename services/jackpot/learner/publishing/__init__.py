"""Publishes weights to the replicas."""
