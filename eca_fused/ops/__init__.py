"""Who computes: the backends with their kernels, and what all of them share."""
