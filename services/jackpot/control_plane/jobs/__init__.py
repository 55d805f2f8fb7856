"""Jobs: their records, their states, the store that keeps them and the scheduler that gives them slots."""
