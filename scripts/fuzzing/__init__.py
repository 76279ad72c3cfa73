"""`scripts/fuzz`: hostile inputs by the million, on all processors, each within limits of time and memory."""
