"""The models of a merge, under one set of names and with one vocabulary."""
