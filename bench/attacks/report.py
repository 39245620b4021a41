"""The figures of one attack: as JSON, and in one line."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from bench.attacks.attacker import Attack
from bench.attacks.measure import Phase, Seen
from bench.attacks.victim import Operation
from bench.attacks.watch import LONGEST_REST

_MB = 1e6


def figures(attack: Attack, seen: Seen) -> dict[str, Any]:
    """All that was seen, in milliseconds, MB and bytes, ready for JSON."""
    before, highest, after = seen.folder
    idle, most = seen.memory
    during = [each for each in seen.operations if any(phase.has(each) for phase in seen.phases)]
    return {
        "attack": attack.name,
        "about": attack.about,
        "settings": dict(attack.settings),
        "other": {kind: _compared(kind, seen) for kind in attack.operations},
        "other_answers": dict(Counter(f"{each.kind} {each.answer}" for each in during)),
        "phases": [_of_phase(phase, attack.operations, seen.operations) for phase in seen.phases],
        "rest_s": seen.rests,
        "memory_mb": {"idle": idle / _MB, "highest": most / _MB, "growth": (most - idle) / _MB},
        "folder_bytes": {"before": before, "highest": highest, "after_sweep": after},
        "attacker_answers": dict(seen.told.answers),
        "longest_held_s": seen.told.longest_held,
        "notes": seen.told.notes,
        "belongings": {"before": seen.belongings[0], "after": seen.belongings[1]},
        "cut_short": seen.cut_short,
        "server_exit_code": seen.exit_code,
    }


def line(found: dict[str, Any]) -> str:
    """The same, for a reader."""
    folder = [found["folder_bytes"][when] for when in ("before", "highest", "after_sweep")]
    in_mb = ", ".join(f"{each['total'] / _MB:.1f}" for each in folder)
    files = ", ".join(str(each["num_files"]) for each in folder)
    memory = found["memory_mb"]
    lost = {name: answer for name, answer in found["belongings"]["after"].items() if answer != "200"}
    bad = {what: number for what, number in found["other_answers"].items() if not what.endswith((" 200", " 202"))}
    words = [
        *(_difference(kind, each) for kind, each in found["other"].items()),
        f"memory {memory['idle']:.0f} MB, +{memory['growth']:.0f}",
        f"folder {in_mb} MB (files {files})",
        f"attacker was answered {_listed(found['attacker_answers'])}",
        f"longest held {found['longest_held_s']:.1f} s",
        f"at rest after {', '.join(map(_rest, found['rest_s']))} s",
        *([f"the other key was answered {_listed(bad)}"] if bad else []),
        f"the other key's {', '.join(found['belongings']['after'])} {f'lost: {_listed(lost)}' if lost else 'kept'}",
        *([_listed(found["notes"])] if found["notes"] else []),
        *([f"CUT SHORT: {found['cut_short']}"] if found["cut_short"] else []),
        *([f"THE SERVER ENDED: {found['server_exit_code']}"] if found["server_exit_code"] is not None else []),
    ]
    return f"{found['attack']}: {'; '.join(words)}"


def _compared(kind: str, seen: Seen) -> dict[str, Any]:
    """Quantiles of one kind alone and under attack, and their ratios; phases alone count only after a rest."""
    calm = [phase for phase in seen.phases if phase.is_attacked or phase.is_calm]
    alone, attacked = (
        _quantiles([each for each in seen.operations if any(p.has(each) for p in calm if p.is_attacked == side)], kind)
        for side in (False, True)
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
    """Of how long those of one kind took; without any, just their number."""
    taken = sorted(1000 * each.seconds for each in operations if each.kind == kind)
    if not taken:
        return {"number": 0}
    p50, p99 = (taken[min(len(taken) - 1, int(len(taken) * share))] for share in (0.5, 0.99))
    return {"number": len(taken), "p50_ms": p50, "p99_ms": p99}


def _difference(kind: str, compared: dict[str, Any]) -> str:
    alone, attacked = compared["alone"], compared["attacked"]
    if "p99_ratio" not in compared:
        return f"{kind} {alone['number']} alone, {attacked['number']} attacked"
    words = [kind]
    for name in ("p99", "p50"):
        ratio = compared[f"{name}_ratio"]
        words.append(f"{name} {alone[f'{name}_ms']:.1f} to {attacked[f'{name}_ms']:.1f} ms ({ratio:.1f}x)")
    return " ".join(words)


def _listed(counts: dict[str, Any]) -> str:
    return ", ".join(f"{name}: {number}" for name, number in sorted(counts.items())) or "nothing"


def _rest(seconds: float | None) -> str:
    return f"more than {LONGEST_REST:.0f}" if seconds is None else f"{seconds:.1f}"
