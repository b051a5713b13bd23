import os

# OpenMP's idle threads sleep instead of spinning. Tests run side by side, with more threads than cores, where a thread that
# spins keeps the one that it waits for from running. On 2 cores, two runs at once: a training run of 8 steps took 0.3 s of
# CPU time instead of 1.2 s, of a small CNN 0.8 s instead of 4.8 s. Must be set before torch loads libgomp.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
