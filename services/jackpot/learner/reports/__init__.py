"""Reports of a step: rows of metrics, alarms, profiles."""
