"""The arithmetic of merging: one function for each method, over a few elements or one matrix."""
