"""Imported by the server of `engines`: what takes each rank longest before it trains, worked out before ranks
are forked.

transformers compiles a thousand regular expressions before it loads its first weights, by which it renames
those of all its architectures: a third of the time that a rank with a tiny model takes.
"""

from __future__ import annotations

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

get_checkpoint_conversion_mapping("bert")
