"""The main job, `python -m eca_fused`: ECA-ResNet-50 on two photographs, checked, timed and drawn.

command.py       options, exit status, JSON
main_job.py      the order of the steps, the result
photographs.py   the input
class_gates.py   the gates for images of different classes: `python -m eca_fused gates`
network.py       the network with seeded weights, and what is observed inside it
check.py         fused and plain PyTorch against float64; comparison.py is what it finds
timing.py        what is timed; measure.py is how
report.py        the result as text and for JSON; console.py shows it; pictures.py draws it
environment.py   what the numbers depend on
"""
