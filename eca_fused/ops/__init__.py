"""The backends, their kernels, and what all backends share."""
