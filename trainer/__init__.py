"""Batches to trained weights. Start reading in loop.py.

setup            a recipe and a world to a Run: calls the files below in their order
resume           where to continue: the run's folder, its checkpoint, the choices it has made
data             readers and batches of the training and the test set
model_setup      the model, its initial weights, its optimizer, DDP
precision        number format, memory layout and convolution method: what `auto` picks
run, state       Run: everything that the loop uses; TrainState: everything that survives a restart
loop             the training loop, and one step of it
periodic         periodic work of the loop: evaluations and checkpoints
metrics          the lines of metrics.jsonl
evaluation       exact metrics on a test set
finish, summary  how a run ends, and its summary.json
run_dir          names and readers of all files in a run's folder
validate_recipe  which values and combinations of recipe keys are refused
description, starts, origin, machine   what a run prints and records about itself, its code and its hardware

The rooms (folders) are described in their own __init__.py.
"""
