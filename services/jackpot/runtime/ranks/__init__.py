"""The ranks of a service whose models are sharded: several processes under torchrun that compute as one."""
