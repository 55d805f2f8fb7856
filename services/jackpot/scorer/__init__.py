"""The OBRS scoring service: it scores each sampled token with the target policy."""
