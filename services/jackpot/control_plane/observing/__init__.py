"""Reads a job's files and bus for its followers: series, samples, logs, pictures, alarms."""
