"""The main job, `python -m eca_fused`: ECA-ResNet-50 on two photographs, checked, timed and drawn.

main_job.py      options, the order of the steps, the result
photographs.py   the input
network.py       the network with seeded weights, and what is observed inside it
check.py         fused against plain PyTorch against float64; floors.py says what is allowed
measure.py       interleaved rounds and their statistics; timing.py what is timed
report.py        tables; console.py draws them; pictures.py draws the figures
environment.py   what the numbers depend on
"""
