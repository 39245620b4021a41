"""The number of threads for training on a machine that other processes use too."""

import os

import torch

from models.demo.recipe.plan import Plan


def fit(plan: Plan) -> None:
    """Set PyTorch's number of threads to the number of idle cores, at least 1 and at most the plan's.

    Threads wait for each other many times per iteration, so one slow thread slows all. Measured next to one busy
    process: two threads at low priority take three times as long as one thread.
    """
    mine = torch.get_num_threads()
    others = max(0, round(os.getloadavg()[0] - mine))
    wanted = max(1, min(plan.threads, (os.cpu_count() or 1) - others))
    if wanted != mine:
        torch.set_num_threads(wanted)
