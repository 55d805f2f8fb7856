"""What a job's files and bus say, for those who follow it: series, samples, logs, pictures, alarms."""
