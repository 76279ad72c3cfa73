"""From two sets of weights to a package."""
