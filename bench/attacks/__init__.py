"""Attacks on a server by one key, measured by how long another key waits.

    python -m bench.attacks [--attack NAME ...] [--seconds 3] [--json FILE]

`--help` lists the attacks. All take five minutes, or ten with `--seconds 10`, whose figures are steadier.

Each attack gets a fresh server with the null model, on loopback, in a separate process. Phases alternate: the other key
alone, then the other key during the attack. The other key's requests come from one process at a fixed rate, and the
attacker's from another, niced process. The server sweeps old files every second, not every minute as usual, so that the
figures show what an attack leaves before and after a sweep. The program prints figures and passes no judgement.
"""

#: The two keys of the server.
ATTACKER, OTHER = "attacker:secret", "other:secret"
#: Seconds between two sweeps of old files by the server under attack.
SWEEP_SECONDS = 1.0
#: The number of phases of each kind. An attack with a fixed number of requests sends an equal part in each phase.
ROUNDS = 2
