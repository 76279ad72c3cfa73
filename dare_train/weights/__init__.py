"""Whatever holds weights: files, adapters, live and sharded models, behind one protocol."""
