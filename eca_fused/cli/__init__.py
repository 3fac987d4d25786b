"""The commands of `python -m eca_fused`, one file or folder each."""
