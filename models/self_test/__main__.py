"""The self test as a child process: python -m models.self_test DEVICE [DIRECTORY].

It prints one JSON object per line: the name of each test before it runs, and then its result. If the process dies, its
parent knows during which test.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from models.self_test import engine, kernels, machine
from models.self_test.trials import Subject, run

TRIALS = (*machine.TRIALS, *kernels.TRIALS, *engine.TRIALS)


def main() -> None:
    """Run the tests on DEVICE and print their results. The test of the weights is skipped."""
    device, *directory = sys.argv[1:]
    subject = Subject(device, Path(directory[0]) if directory else None)
    for result in run(TRIALS, subject, lambda name: _print({"running": name})):
        _print(dataclasses.asdict(result))


def _print(content: dict[str, Any]) -> None:
    print(json.dumps(content), flush=True)


if __name__ == "__main__":
    main()
