"""How many threads to compute on, on a machine that others use too."""

import os

import torch

from models.demo.recipe.plan import Plan


def fit(plan: Plan) -> None:
    """Give one thread up for each core that others keep busy, and take it back when they are done.

    Threads wait for each other many times an iteration. Measured: beside one busy process, two threads at low priority
    take three times as long as one alone.
    """
    mine = torch.get_num_threads()
    others = max(0, round(os.getloadavg()[0] - mine))
    wanted = max(1, min(plan.threads, (os.cpu_count() or 1) - others))
    if wanted != mine:
        torch.set_num_threads(wanted)
