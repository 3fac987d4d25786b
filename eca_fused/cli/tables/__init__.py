"""`python -m eca_fused tables`: parameters and FLOPs beside the poster's figures."""
