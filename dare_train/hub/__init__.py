"""The Hub of Hugging Face, as far as weights and packages need it."""
