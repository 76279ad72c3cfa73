"""The same few operations on raw bits, written several times.

`reference` defines them in torch; `cpu` computes them with Numba. `cuda` does a whole model at once with Triton where its weights
lie, and `plain` the same with torch; `choice` says which. Results are equal bit for bit.
"""
