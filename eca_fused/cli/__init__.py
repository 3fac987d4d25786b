"""The commands of `python -m eca_fused`, a file or a folder each."""
