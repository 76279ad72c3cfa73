"""Deltas as LoRA adapters of low rank."""
