"""Measuring a model: its metrics on texts, with other weights in its place."""
