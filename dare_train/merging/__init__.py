"""Merging: one checkpoint or package from several packages and checkpoints on one base."""
