"""The self test as a child process: python -m models.self_test DEVICE [--directory DIRECTORY] [--after TEST].

It prints one JSON object per line: the name of each test before it runs, and then its result. If the process dies, its
parent knows during which test.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from models.self_test import engine, kernels, machine
from models.self_test.trials import Subject, run

TRIALS = (*machine.TRIALS, *kernels.TRIALS, *engine.TRIALS)


def main() -> None:
    """Run the tests on DEVICE, or those after TEST, and print their results. The test of the weights is skipped."""
    parser = argparse.ArgumentParser(prog="python -m models.self_test", description=__doc__)
    parser.add_argument("device", choices=("cpu", "cuda"))
    parser.add_argument("--directory", type=Path, help="directory of compiled code")
    parser.add_argument("--after", help="name of a test: skip it and the tests before it")
    arguments = parser.parse_args()
    names = [trial.name for trial in TRIALS]
    trials = TRIALS[names.index(arguments.after) + 1 :] if arguments.after else TRIALS
    for result in run(trials, Subject(arguments.device, arguments.directory), lambda name: _print({"running": name})):
        _print(dataclasses.asdict(result))


def _print(content: dict[str, Any]) -> None:
    print(json.dumps(content), flush=True)


if __name__ == "__main__":
    main()
