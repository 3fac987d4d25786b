"""`python -m eca_fused gates`: the gates for images of different classes."""
