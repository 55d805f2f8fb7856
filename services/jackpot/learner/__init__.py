"""The learner service: the joint objective, updating policy and actor."""
