"""Questions about DARE on one's own model, measured: how much can be dropped, what happens inside, and what
is it worth in bytes.
"""
