"""Launchers: they bring a job's processes up, keep them up, and take them down."""
