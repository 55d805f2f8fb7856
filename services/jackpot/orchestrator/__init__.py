"""The orchestrator: prompts, rewards, dispatch over the rollout replicas, evaluation."""
