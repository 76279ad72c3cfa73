"""Figures about a model's data that some merges weigh by: Fisher information, Gram matrices."""
