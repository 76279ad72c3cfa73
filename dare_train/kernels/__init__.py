"""The same few operations on raw bits, written several times, with results equal bit for bit.

`reference` defines them in torch; `cpu` computes them with Numba. `cuda` does a whole model at once with
Triton where its weights lie, and `cuda_in_torch` the same with torch; `backends` says which.
"""
