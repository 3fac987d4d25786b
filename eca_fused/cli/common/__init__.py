"""What commands, examples and benchmarks share.

console.py       progress and tables
environment.py   what numbers depend on: machine, versions, settings
measure.py       interleaved times and their statistics
photographs.py   the pictures that networks see
"""
