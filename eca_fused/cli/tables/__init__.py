"""`python -m eca_fused tables`: parameters and FLOPs beside those that the poster reports."""
