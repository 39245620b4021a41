"""The command line: python -m models.demo.recipe --device auto --scale small.

Without names of steps, it takes all steps, and continues where it was stopped. Besides the server's dependencies, it
needs npm (for the drawings), resvg-py, sentencepiece and protobuf.
"""

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch

from models.demo.recipe import (
    autoencoder,
    checker,
    checkpoint,
    decoder,
    depths,
    evaluate,
    export,
    flow,
    handover,
    judge,
    lora,
    reading,
    redux,
    render,
    tuning,
)
from models.demo.recipe.plan import PLANS, Plan

STEPS: dict[str, Callable[[Plan, str], None]] = {
    "render": lambda plan, device: render.fetch(),
    "autoencoder": autoencoder.train,
    "judge": judge.train,
    "reading": reading.train,
    "flow": flow.train,
    "decoder": decoder.train,
    "checker": checker.train,
    "lora": lora.train,
    "redux": redux.train,
    "depths": depths.train,
    "tuning": tuning.train,
    "export": lambda plan, device: export.write(plan),
    "evaluate": lambda plan, device: evaluate.run(plan, device, export.FOLDER),
}
#: The step that is only taken if it is named: it writes what the next training starts from into the repository.
HANDOVER = "handover"


def main() -> None:
    """Parse the arguments and take the steps in order."""
    parser = argparse.ArgumentParser(prog="python -m models.demo.recipe", description=__doc__)
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"steps to take (default: all but {HANDOVER})")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--scale", choices=tuple(PLANS), default="small")
    parser.add_argument("--threads", type=int, default=2, help="the most threads; fewer while other processes are busy")
    parser.add_argument("--flow-iterations", type=int, help="iterations of the step `flow` (default: as --scale says)")
    parser.add_argument("--from-scratch", action="store_true", help="ignore the weights in the repository")
    parser.add_argument("--eager", action="store_true", help="compile nothing, for machines without a C++ compiler")
    parser.add_argument("--weights", type=Path, help="directory to evaluate, instead of the exported one")
    arguments = parser.parse_args()
    if unknown := set(arguments.steps) - {*STEPS, HANDOVER}:
        parser.error(f"no such step: {', '.join(sorted(unknown))}; choose from {', '.join((*STEPS, HANDOVER))}")
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(arguments.threads)
    plan = PLANS[arguments.scale]
    plan = dataclasses.replace(
        plan,
        is_compiled=not arguments.eager,
        is_from_scratch=arguments.from_scratch,
        threads=arguments.threads,
    )
    if arguments.flow_iterations:
        plan = dataclasses.replace(plan, flow_iterations=arguments.flow_iterations)
    for name, step in STEPS.items():
        if not arguments.steps or name in arguments.steps:
            checkpoint.log(f"step {name}, scale {plan.scale}, on {device}")
            if name == "evaluate" and arguments.weights:
                evaluate.run(plan, device, arguments.weights)
            else:
                step(plan, device)
    if HANDOVER in arguments.steps:
        handover.write(plan)


if __name__ == "__main__":
    main()
