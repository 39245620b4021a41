"""Can one client hold up another? Attacks by one key on a server of its own, measured at another key.

    python -m bench.attacks [--attack NAME ...] [--seconds 3] [--json FILE]

`--help` lists the attacks. All take five minutes, or ten with `--seconds 10`, whose figures are steadier.

Each attack gets a fresh server with the null model, on loopback, in a process of its own. Phases alternate: the other
key alone, then the attack beside it. The other key's requests come at a fixed rate from a process of their own, and the
attacker's from another, which is niced. The server looks for old files every second, not every minute as usual, so that
what an attack leaves can be seen before and after a sweep. Nothing is judged: the figures are printed.
"""

#: The two keys of the server.
ATTACKER, OTHER = "attacker:secret", "other:secret"
#: How often the server under attack looks for what is to be deleted, in seconds.
SWEEP_SECONDS = 1.0
#: How many phases of each kind there are; an attack of so many requests sends an equal part of them in each.
ROUNDS = 2
