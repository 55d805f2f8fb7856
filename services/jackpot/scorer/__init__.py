"""The OBRS scoring service: what the target policy says about each sampled token."""
