"""Weights in memory, of one process or spread over many."""
