"""The main job, `python -m eca_fused`: ECA-ResNet-50 on two photographs, checked, timed and drawn.

command.py       options, exit status, JSON
main_job.py      the order of the steps, the result
network.py       the network with seeded weights, and observations inside it
check.py         fused and plain PyTorch against float64; comparison.py holds the results
timing.py        times of layers and of the network
report.py        the result as text and for JSON
pictures.py      the pictures
"""
