"""Kubernetes: one JobSet per job. No other package knows about Kubernetes."""
