"""The parts of train.py: options, data, processes, checkpoints, the loop, the results."""
