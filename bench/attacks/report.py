"""The figures of one attack, as JSON and as one line."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from bench.attacks.attacker import Attack
from bench.attacks.measure import Phase, Seen
from bench.attacks.victim import Operation
from bench.attacks.watch import LONGEST_REST

_MB = 1e6


def figures(attack: Attack, seen: Seen) -> dict[str, Any]:
    """Return all observations, ready for JSON. Names of figures end in their unit."""
    before, highest, after = seen.directory_bytes
    idle, highest_memory = seen.memory
    during = [each for each in seen.operations if any(phase.has(each) for phase in seen.phases)]
    return {
        "attack": attack.name,
        "about": attack.about,
        "settings": dict(attack.settings),
        "other": {kind: _compared(kind, seen) for kind in attack.operations},
        "other_answers": dict(Counter(f"{each.kind} {each.answer}" for each in during)),
        "phases": [_of_phase(phase, attack.operations, seen.operations) for phase in seen.phases],
        "rest_s": seen.rests,
        "memory_mb": {"idle": idle / _MB, "highest": highest_memory / _MB, "growth": (highest_memory - idle) / _MB},
        "directory_bytes": {"before": before, "highest": highest, "after_sweep": after},
        "attacker_answers": dict(seen.responses.answers),
        "longest_held_s": seen.responses.longest_held,
        "notes": seen.responses.notes,
        "belongings": {"before": seen.belongings[0], "after": seen.belongings[1]},
        "cut_short": seen.cut_short,
        "server_exit_code": seen.exit_code,
    }


def line(results: dict[str, Any]) -> str:
    """Return the figures as one readable line."""
    sizes = [results["directory_bytes"][when] for when in ("before", "highest", "after_sweep")]
    in_mb = ", ".join(f"{each['total'] / _MB:.1f}" for each in sizes)
    files = ", ".join(str(each["num_files"]) for each in sizes)
    memory = results["memory_mb"]
    lost = {name: answer for name, answer in results["belongings"]["after"].items() if answer != "200"}
    errors = {
        operation: number
        for operation, number in results["other_answers"].items()
        if not operation.endswith((" 200", " 202"))
    }
    parts = [
        *(_difference(kind, each) for kind, each in results["other"].items()),
        f"memory {memory['idle']:.0f} MB, +{memory['growth']:.0f}",
        f"data directory {in_mb} MB (files {files})",
        f"attacker got {_listed(results['attacker_answers'])}",
        f"longest held {results['longest_held_s']:.1f} s",
        f"at rest after {', '.join(map(_rest, results['rest_s']))} s",
        *([f"the other key got {_listed(errors)}"] if errors else []),
        f"the other key's {', '.join(results['belongings']['after'])} {f'lost: {_listed(lost)}' if lost else 'kept'}",
        *([_listed(results["notes"])] if results["notes"] else []),
        *([f"CUT SHORT: {results['cut_short']}"] if results["cut_short"] else []),
        *([f"THE SERVER ENDED: {results['server_exit_code']}"] if results["server_exit_code"] is not None else []),
    ]
    return f"{results['attack']}: {'; '.join(parts)}"


def _compared(kind: str, seen: Seen) -> dict[str, Any]:
    """Return the quantiles of one kind of operation, without and with the attack, and their ratios.

    A phase without the attack counts only if the server was at rest before it.
    """
    calm = [phase for phase in seen.phases if phase.is_attacked or phase.is_calm]
    alone, attacked = (
        _quantiles(
            [each for each in seen.operations if any(p.has(each) for p in calm if p.is_attacked == is_attacked)], kind
        )
        for is_attacked in (False, True)
    )
    has_both = alone["number"] and attacked["number"]
    ratios = (
        {f"{name}_ratio": attacked[f"{name}_ms"] / alone[f"{name}_ms"] for name in ("p50", "p99")} if has_both else {}
    )
    return {"alone": alone, "attacked": attacked, **ratios}


def _of_phase(phase: Phase, kinds: Sequence[str], operations: Sequence[Operation]) -> dict[str, Any]:
    within = [each for each in operations if phase.has(each)]
    return {
        "is_attacked": phase.is_attacked,
        "seconds": phase.ended_at - phase.begun_at,
        "is_calm_before": phase.is_calm,
        **{kind: _quantiles(within, kind) for kind in kinds},
    }


def _quantiles(operations: Sequence[Operation], kind: str) -> dict[str, float]:
    """Return the number and the quantiles, in milliseconds, of one kind of operation; only the number if it is 0."""
    milliseconds = sorted(1000 * each.seconds for each in operations if each.kind == kind)
    if not milliseconds:
        return {"number": 0}
    p50, p99 = (milliseconds[min(len(milliseconds) - 1, int(len(milliseconds) * share))] for share in (0.5, 0.99))
    return {"number": len(milliseconds), "p50_ms": p50, "p99_ms": p99}


def _difference(kind: str, compared: dict[str, Any]) -> str:
    alone, attacked = compared["alone"], compared["attacked"]
    if "p99_ratio" not in compared:
        return f"{kind} {alone['number']} alone, {attacked['number']} attacked"
    parts = [kind]
    for name in ("p99", "p50"):
        ratio = compared[f"{name}_ratio"]
        parts.append(f"{name} {alone[f'{name}_ms']:.1f} to {attacked[f'{name}_ms']:.1f} ms ({ratio:.1f}x)")
    return " ".join(parts)


def _listed(counts: dict[str, Any]) -> str:
    return ", ".join(f"{name}: {number}" for name, number in sorted(counts.items())) or "nothing"


def _rest(seconds: float | None) -> str:
    return f"more than {LONGEST_REST:.0f}" if seconds is None else f"{seconds:.1f}"
