"""From groups to scored groups: the target's log-probabilities, the OBRS mask, the ingredients of Z."""
