"""Offline replay: weights, acceptance and diagnostics of stored trajectories under any setting, without training."""
