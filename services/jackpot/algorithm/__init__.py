"""What the paper says, as pure functions: tensors in, tensors out, in log space."""
