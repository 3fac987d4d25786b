"""What train.py is made of: options, data, processes, checkpoints, the loop, the results."""
