"""The paper's equations as pure functions: tensors in, tensors out, in log space."""
