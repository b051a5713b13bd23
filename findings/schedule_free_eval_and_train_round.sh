#!/usr/bin/env bash
# Schedule-free optimizers (schedulefree 1.4.1, pytorch_optimizer 4.1.0, torch 2.13.0): eval() and then train() do not bring
# the weights back exactly, and what they remember of the steps is in param_groups, beside the options.
#
# They train at one point and are evaluated at another: eval() moves the weights in place to the second, by an interpolation
# with the state z, and train() moves them back by another one. Each rounds, so some weights differ in their last bit after
# the two. And the sum of weights, the largest learning rate and the number of steps so far are values of param_groups, where
# torch's optimizers keep options only; whoever loads a state and then puts options of a new optimizer back, to let a recipe
# change them, resets these as well.
#
# Output seen for 1,000 weights after 10 steps with lr 0.1 (the counts depend on the processor, but none is 0):
#
#   schedulefree AdamWScheduleFree          124 weights differ, by at most 6.0e-08; in param_groups: k lr_max weight_sum
#   pytorch_optimizer ScheduleFreeAdamW     124 weights differ, by at most 6.0e-08; in param_groups: lr_max step weight_sum
#
# Why it matters here: a checkpoint or an evaluation must not change the training that follows, or a run that is killed and
# resumed ends elsewhere. trainer/optim/average.py keeps a copy of the weights while others are in place, and
# trainer/checkpoints/checkpoint.py puts back only those values of param_groups that a recipe can give.
#
# Exit code 0 if this is still so, 1 if it has changed.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 numpy==2.4.6 schedulefree==1.4.1 pytorch_optimizer==4.1.0
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
from pytorch_optimizer import ScheduleFreeAdamW
from schedulefree import AdamWScheduleFree

has_changed = False
for package, kind in (("schedulefree", AdamWScheduleFree), ("pytorch_optimizer", ScheduleFreeAdamW)):
    torch.manual_seed(0)
    weights = torch.nn.Parameter(torch.randn(1000))
    optimizer = kind([weights], lr=0.1)
    fresh = {name: value for name, value in optimizer.param_groups[0].items() if name != "params"}
    optimizer.train()
    for _ in range(10):
        weights.grad = 0.1 * weights.detach() + 0.01 * torch.randn(1000)
        optimizer.step()
    before = weights.detach().clone()
    optimizer.eval()
    optimizer.train()
    differs = weights.detach() != before
    largest = (weights.detach() - before).abs().max().item()
    counted = [
        name for name, value in optimizer.param_groups[0].items()
        if name in ("k", "step", "weight_sum", "lr_max") and value != fresh.get(name)
    ]
    print(
        f"{package + ' ' + kind.__name__:40}{int(differs.sum())} weights differ, by at most {largest:.1e}; "
        f"in param_groups: {' '.join(sorted(counted))}"
    )
    has_changed |= not differs.any() or not {"weight_sum", "lr_max"} <= set(counted)
sys.exit(has_changed)
PYTHON
