"""Attacks on a server by one key, measured by how long another key waits.

    python -m bench.attacks [--attack NAME ...] [--seconds 3] [--json FILE]

`--help` lists the attacks. Together they take five minutes. With `--seconds 10` they take ten minutes, and
the figures are steadier.

Each attack gets a fresh server on loopback, in a separate process, with models that need no weights. Phases alternate:
the other key alone, then the other key during the attack. One process sends the other key's requests at a fixed rate.
Another process, with a low CPU priority, sends the attacker's requests. The server deletes old files every second
instead of every minute, so that the figures show the data directory before and after a deletion. The program prints
figures and passes no judgement.
"""

#: The two keys of the server.
ATTACKER, OTHER = "attacker:secret", "other:secret"
#: Seconds between two sweeps of the server under attack, in which it deletes old files.
SWEEP_SECONDS = 1.0
#: The number of phases with the attack, and of phases without it. An attack with a fixed number of requests sends an
#: equal part in each of its phases.
ROUNDS = 2
