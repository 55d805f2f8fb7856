"""The models that learn, and how they are made ready for it."""
