"""The orchestrator: prompts and rewards, paced dispatch to rollout replicas, evaluation, the ledger. No torch."""
