"""The main job, `python -m eca_fused`: ECA-ResNet-50 on two photographs, checked, timed and drawn.

command.py       options, exit status, JSON
main_job.py      the order of the steps, the result
network.py       the network with seeded weights, and what is observed inside it
check.py         fused and plain PyTorch against float64; comparison.py is what it finds
timing.py        what is timed
report.py        the result as text and for JSON
pictures.py      the pictures
"""
