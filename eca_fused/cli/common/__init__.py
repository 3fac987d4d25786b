"""Code that commands, examples and benchmarks share.

accuracy.py      what rounding alone makes of a result
console.py       progress and tables
environment.py   machine, versions and settings that numbers depend on
measure.py       interleaved times and their statistics
networks.py      statistics of batch norms, hooks
packages.py      packages that not everybody has installed
photographs.py   the pictures that networks see
style.py         how pictures look
"""
