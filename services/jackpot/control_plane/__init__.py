"""The control plane: starts jobs, follows them, reports on them."""
