"""Kubernetes: one JobSet per job. Outside this package nothing knows that Kubernetes exists."""
