"""One protocol for whatever holds weights, and what its tensors are called."""
