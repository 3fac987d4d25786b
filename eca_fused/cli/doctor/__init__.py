"""`python -m eca_fused doctor`: what is installed, what runs, and whether it computes the truth."""
