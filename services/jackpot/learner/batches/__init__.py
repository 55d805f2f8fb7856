"""Which groups make a batch, and how its sequences are packed."""
