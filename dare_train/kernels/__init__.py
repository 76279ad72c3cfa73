"""The same few operations on raw bits, written several times.

`reference` defines them in torch; `cpu` computes them with Numba. Results are equal bit for bit.
"""
