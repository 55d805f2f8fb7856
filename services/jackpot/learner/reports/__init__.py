"""What a step reports: rows of metrics, alarms, profiles."""
