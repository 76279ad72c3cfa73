"""Training that knows of deltas: sparse tuning, subnetworks, task after task, lottery tickets."""
