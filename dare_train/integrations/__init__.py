"""Other tools that train: each of them in a small file."""
