"""The groups of a batch, and the packing of its sequences."""
