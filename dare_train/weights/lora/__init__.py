"""LoRA adapters on a base, as if merged."""
