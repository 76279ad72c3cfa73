"""A base and packages in, weights out: on disk, in place, on devices."""
