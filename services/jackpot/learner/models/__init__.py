"""The trained models, and their preparation for training."""
