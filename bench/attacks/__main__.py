"""The command line: `python -m bench.attacks`."""

import argparse
import json
import os
import sys
from pathlib import Path

import bench.attacks
from bench.attacks import bodies, loras, storage
from bench.attacks.measure import measure
from bench.attacks.report import figures, line

ATTACKS = {attack.name: attack for attack in (*loras.ATTACKS, *bodies.ATTACKS, *storage.ATTACKS)}
#: The most seconds that all attacked phases of one attack may take together.
MAX_SECONDS = 20.0


def main() -> None:
    """Run the attacks and print a line for each."""
    attack_list = "\n".join(f"  {attack.name:18}{attack.about}" for attack in ATTACKS.values())
    parser = argparse.ArgumentParser(
        description=bench.attacks.__doc__, epilog=attack_list, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--attack", nargs="+", choices=tuple(ATTACKS), default=list(ATTACKS), metavar="NAME")
    parser.add_argument(
        "--seconds",
        type=float,
        default=3,
        help="seconds of an attacked phase, at most 10; a phase without attack takes half as long",
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    seconds = min(options.seconds, MAX_SECONDS / bench.attacks.ROUNDS)
    machine = f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores, Python {sys.version.split()[0]}"
    print(f"{machine}; {bench.attacks.ROUNDS} phases of {seconds:g} s at most for each attack", flush=True)
    results = []
    for name in options.attack:
        results.append(figures(ATTACKS[name], measure(ATTACKS[name], seconds)))
        print(line(results[-1]), flush=True)
        if options.json:
            options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
