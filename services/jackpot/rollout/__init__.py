"""The rollout service: the actor behind gRPC."""
