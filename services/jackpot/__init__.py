"""Jackpot: reinforcement learning with rollouts from a cheaper model than the one being trained."""

__version__ = "0.1.0"
