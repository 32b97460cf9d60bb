"""What the paper claims, against this run's numbers: every verdict follows from them by a rule shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np

from eval.merging.curves import Curve, ratio_to
from eval.suite import curves, learning, table2
from eval.suite.codecs import QUALITY
from eval.suite.context import Context, get
from eval.suite.measure import pictures
from eval.suite.numbers import Interval, Record, interval, number, ratio, span
from eval.suite.paper import TABLE_II
from eval.suite.physical import SDXL_LATENT
from eval.suite.policies import LEARNERS, Learner, problem, training
from eval.suite.timing import timings

Verdict: TypeAlias = Literal["holds", "does not hold", "not testable here"]

WITHIN = 0.3
"""Per cent over a limit that counts as within it: three standard errors of an evaluation on 64,000 frames,
which were up to 0.06 % of latency limits and 0.1 % of energy budgets."""
CUT = 40.0
"""Per cent: the abstract's "over 40 % latency"."""
LINEAR = 0.95
"""R^2 from which latency counts as linear in FLOPs."""
COMPARABLE = 1.1
"""Ratio of MSEs up to which two methods count as comparable."""
FAR = 2.0
"""Ratio of MSEs from which one is worse by far."""
SETTLED = 1.05
"""A training counts as converged from where its MSE stays within this factor of its last."""


class Claim(NamedTuple):
    """A row of the table."""

    text: str
    where: str
    values: list[Record]
    """Labelled numbers."""
    rule: str
    verdict: Verdict


def claims(context: Context) -> Record:
    """Return the claims table."""
    rows = [
        *latency(context),
        *linearity(context),
        *distillation(context),
        *learned(context),
        *untestable(context),
    ]
    table = {
        "id": "claims",
        "layout": "cards",
        "title": "Claims",
        "caption": "Each claim of the paper's abstract and section V, what this run found, and the rule "
        "that decides. Brackets are 95 % bootstrap intervals over paired pictures, or span the seeds of "
        "policies, which learn and are judged on these same pictures. A ratio is one MSE over another.",
        "columns": [
            {"key": "verdict", "label": "verdict", "unit": "", "digits": 0},
            {"key": "found", "label": "found here", "unit": "", "digits": 3},
            {"key": "rule", "label": "holds if", "unit": "", "digits": 0},
            {"key": "where", "label": "claimed in", "unit": "", "digits": 0},
        ],
        "rows": [
            {
                "label": row.text,
                "cells": {"verdict": row.verdict, "found": row.values, "rule": row.rule, "where": row.where},
                **({"timed": True} if any(v.get("timed") for v in row.values) else {}),
            }
            for row in rows
        ],
    }
    total = {verdict: sum(row.verdict == verdict for row in rows) for verdict in get_args(Verdict)}
    return {
        "text": [],
        # A verdict on what a clock said may differ from run to run.
        "summary": {verdict: number(count, "measured", timed=True) for verdict, count in total.items()},
        "tables": [table],
        "figures": [],
    }


def _value(label: str, record: Record) -> Record:
    return {"label": label, **record}


def _verdict(holds: bool) -> Verdict:
    return "holds" if holds else "does not hold"


def latency(context: Context) -> list[Claim]:
    """Return the claims on latency, from Table II's savings."""
    found = next(t for t in table2.table2(context)["tables"] if t["id"] == "table2-savings")
    cells = {row["label"]: row["cells"] for row in found["rows"]}
    first, finetune = TABLE_II[0].label, TABLE_II[2].label
    claims = []
    for against, text, where in (
        (f"{first}, raw 16-bit RGB", "Latency falls by over 40 % against centralised generation with raw "
        "pictures",
         "abstract, V-B1"),
        (finetune, "Latency falls by over 40 % against MEG-Split-Finetune", "V-B1"),
        (f"{first}, JPEG {QUALITY}", "Latency falls by over 40 % against centralised generation with JPEG "
        f"{QUALITY}",
         "not asked in the paper"),
    ):  # fmt: skip
        for fast in (TABLE_II[4], TABLE_II[5]):
            own = cells[f"{fast.label}, against {against}"]
            values = [_value(k, own[k]) for k in ("modelled", "calibrated", "paper") if k in own]
            rule = f"the modelled saving is above {CUT:g} %"
            verdict = _verdict(own["modelled"]["value"] > CUT)
            claims.append(Claim(f"{text}, at T = {fast.steps}", where, values, rule, verdict))
    return claims


def linearity(context: Context) -> list[Claim]:
    """Return the claims of Fig. 3."""
    found = get(context, timings(context.config))
    r_squared = number(found["lines"]["all"]["r_squared"], "measured", timed=True)
    rule = f"R² is at least {LINEAR:g}"
    claims = [
        Claim(
            "Latency is linear in FLOPs",
            "V-A, Fig. 3",
            [_value("R²", r_squared)],
            rule,
            _verdict(r_squared["value"] >= LINEAR),
        )
    ]
    joules = [p["joules"] for p in found["points"]]
    if any(j is None for j in joules):
        text = "no energy meter can be read here"
        return [*claims, Claim("Energy is linear in FLOPs", "V-A, Fig. 3", [], text, "not testable here")]
    flops = np.asarray([p["flops"] for p in found["points"]])
    r_squared = number(np.corrcoef(flops, joules)[0, 1] ** 2, "measured", timed=True)
    verdict = _verdict(r_squared["value"] >= LINEAR)
    return [
        *claims,
        Claim("Energy is linear in FLOPs", "V-A, Fig. 3", [_value("R²", r_squared)], rule, verdict),
    ]


def distillation(context: Context) -> list[Claim]:
    """Return the claims of section V-B1, on the pictures."""
    config, data = context.config, curves.fig5_data(context)
    pruning = curves.stronger_pruning(context, data)
    over_steps = {key: np.mean(list(own.values()), axis=0) for key, own in data.items()}
    split, finetune = over_steps["split/0"], over_steps["split_finetune/0"]
    claims = []

    def compare(text: str, where: str, values: dict[str, Interval], rule: str, holds: bool) -> None:
        records = [_value(k, interval(v, "measured")) for k, v in values.items()]
        claims.append(Claim(text, where, records, rule, _verdict(holds)))

    errors = {
        row.label: get(context, table2.shown(config, row, _name(context, row)))["mse"] for row in TABLE_II[1:]
    }
    others = {label: own for label, own in errors.items() if label != "MEG-Split"}
    worst = max(others, key=lambda label: others[label].mean())
    against = ratio(errors["MEG-Split"], others[worst])
    compare(
        "MEG-Split's pictures are noisy: it is the worst method by far",
        "V-B1, Fig. 4, Table II",
        {f"over the next worst, {worst}": against, "over MEG-Split-Finetune": ratio(split, finetune)},
        f"the interval of its MSE over the next worst of Table II is above {FAR:g}",
        against.low >= FAR,
    )
    falls = {
        f"r = {r:g}: T = 12 over T = 4": ratio(data[f"meg/{r:g}"][12], data[f"meg/{r:g}"][4])
        for r in (0.1, 0.5, 0.8)
    }
    compare(
        "MEG's MSE falls with the denoising steps",
        "V-B1, Fig. 5",
        falls,
        "every interval is below 1",
        all(v.high < 1 for v in falls.values()),
    )
    rise = {f"r = {b} over r = {a}": ratio(over_steps[f"meg/{b}"], over_steps[f"meg/{a}"])
            for a, b in (("0.1", "0.5"), ("0.5", "0.8"))}  # fmt: skip
    compare(
        "MEG's MSE rises with the merging ratio",
        "V-B1, Fig. 5",
        rise,
        "every interval is above 1, means over T",
        all(v.low > 1 for v in rise.values()),
    )
    tenth = over_steps[f"{pruning}/0.1"]
    for text, other in (
        ("Pruning a tenth already errs much more than MEG-Split-Finetune", finetune),
        ("Merging is far better than pruning at equal ratio, a tenth", over_steps["meg/0.1"]),
    ):
        pruned = ratio(tenth, other)
        rule = f"the interval of pruning's MSE over the other's is above {FAR:g}, means over T"
        compare(text, "V-B1, Fig. 5", {"ratio": pruned}, rule, pruned.low >= FAR)
    half = ratio(over_steps["meg/0.5"], finetune)
    compare(
        "Merging up to r = 0.5 is comparable to MEG-Split-Finetune",
        "V-B1, Fig. 5",
        {"ratio": half, "without ToMe": ratio(over_steps["meg_plain/0.5"], finetune)},
        f"the interval ends at {COMPARABLE:g} at most, means over T",
        half.high <= COMPARABLE,
    )
    small = ratio(data["meg/0.1"][4], data["split_finetune/0"][4])
    compare(
        "MEG beats MEG-Split-Finetune where T and r are small",
        "V-B1, Fig. 5",
        {"r = 0.1, T = 4": small},
        "the interval is below 1",
        small.high < 1,
    )
    finetuned, plain = errors[TABLE_II[2].label], pictures(config, "meg_plain", 7, 0.4)
    setting = ratio(errors[TABLE_II[4].label], finetuned)
    compare(
        "MEG at T = 7, r = 0.4 is not worse than MEG-Split-Finetune at T = 8",
        "Table II",
        {"ratio": setting, "without ToMe": ratio(get(context, plain)["mse"], finetuned)},
        "the interval ends at 1 at most",
        setting.high <= 1,
    )
    equal, lengths = at_equal_bits(context)
    compare(
        "Merging beats pruning at equal bits",
        "II-A, V-B1",
        {"ratio": equal},
        f"the interval is below 1, geometric mean over {lengths} equal lengths, side information charged",
        equal.high < 1,
    )
    return claims


def _name(context: Context, row: Any) -> Any:
    return table2.stronger(context, row) if row.method == "pruning" else row.method


def at_equal_bits(context: Context) -> tuple[Interval, int]:
    """Return MEG's MSE over the stronger pruning's, a geometric mean, and the lengths, which both reach."""
    data = curves.payload_data(context)
    # What reaches a length reaches all longer ones.
    lengths = min(len(data[name][1]) for name in (*context.prunings, "meg"))
    shares = np.asarray(curves.SHARES[:lengths])
    pruned = np.stack([data[name][1][:lengths] for name in context.prunings])
    best = np.argmin(pruned.mean(axis=2), axis=0)
    stronger = np.take_along_axis(pruned, best[None, :, None], axis=0)[0]
    found = ratio_to(Curve(shares, stronger), Curve(shares, data["meg"][1][:lengths]), shares)
    return Interval(*found), lengths


def learned(context: Context) -> list[Claim]:
    """Return the claims of section V-B2, on the policies."""
    config, found = context.config, get(context, problem(context.config))
    trained: dict[Learner, Any] = {key: get(context, training(config, key)) for key in LEARNERS}
    mse = {key: _mse(own) for key, own in trained.items()}
    claims = []

    def limit(text: str, where: str, key: Learner, limits: Sequence[int], *, kept: bool) -> None:
        energy = where.endswith("Fig. 7")
        over = _excess(found, trained[key], energy=energy)
        values = [
            _value(_limit_name(found, i, energy), interval(span(over[i]), "modelled", "% over"))
            for i in limits
        ]
        if kept:
            rule = f"no seed is more than {WITHIN:g} % over"
            holds = max(max(over[i]) for i in limits) <= WITHIN
        else:  # of many seeds one would be, by chance
            rule = f"its seeds are more than {WITHIN:g} % over in the mean"
            holds = max(float(np.mean(over[i])) for i in limits) > WITHIN
        claims.append(Claim(text, where, values, rule, _verdict(holds)))

    loose, middle, tight = learning.LATENCY
    for key, label in LEARNERS.items():
        limit(f"{label} keeps the loose latency limit", "V-B2, Fig. 6", key, [loose], kept=True)
    better = _seeds_ratio(mse["cvpo"][loose], mse["ppo"][loose])
    claims.append(
        Claim(
            "At the loose limit MEG-CVPO reaches higher quality than PPO-Lagrangian",
            "V-B2, Fig. 6",
            [_value("its MSE over PPO-Lagrangian's", interval(better, "measured"))],
            "each of its seeds has a lower MSE, a geometric mean over frames, than each of PPO-Lagrangian's",
            _verdict(better.high < 1),
        )
    )
    annealed = (
        "; learning rate and exploration fall over each budget, so a longer one settles later"
        if config.rules == "default"
        else ""
    )
    frames: dict[Learner, list[float]] = {key: _settled(own, loose) for key, own in trained.items()}
    budgets: dict[Learner, float] = {
        key: own["frames_per_epoch"] * own["runs"][0]["epochs"][-1] / 1e6 for key, own in trained.items()
    }
    claims.append(
        Claim(
            f"At the loose limit MEG-CVPO converges faster, trained for {budgets['cvpo']:.3g} million frames "
            f"against {budgets['ppo']:.3g}",
            "V-B2, Fig. 6",
            [_value(LEARNERS[k], interval(span(v), "measured", "million frames")) for k, v in frames.items()],
            f"it needs fewer frames until its MSE stays within {100 * (SETTLED - 1):.0f} % of its last, "
            f"seeds' mean{annealed}",
            _verdict(bool(np.mean(frames["cvpo"]) < np.mean(frames["ppo"]))),
        )
    )
    limit("MEG-CVPO keeps the middle latency limit", "V-B2, Fig. 6", "cvpo", [middle], kept=True)
    limit("MEG-CVPO keeps the tight latency limit", "V-B2, Fig. 6", "cvpo", [tight], kept=True)
    limit("PPO-Lagrangian violates the tight latency limit", "V-B2, Fig. 6", "ppo", [tight], kept=False)
    worse = _seeds_ratio(mse["cvpo"][tight], mse["ppo"][tight])
    claims.append(
        Claim(
            "At the tight limit MEG-CVPO's MSE is much higher than PPO-Lagrangian's",
            "V-B2, Fig. 6",
            [_value("its MSE over PPO-Lagrangian's", interval(worse, "measured"))],
            f"each of its seeds has at least {FAR:g} times the MSE, a geometric mean over frames, of each of "
            "PPO-Lagrangian's",
            _verdict(worse.low >= FAR),
        )
    )
    limit("MEG-CVPO keeps every energy budget", "V-B2, Fig. 7", "cvpo", learning.ENERGY, kept=True)
    limit(
        "PPO-Lagrangian violates the tight energy budget",
        "V-B2, Fig. 7",
        "ppo",
        [learning.ENERGY[2]],
        kept=False,
    )
    over: dict[Learner, Any] = {key: _excess(found, own, energy=True) for key, own in trained.items()}
    gaps: dict[Learner, float] = {
        # The loose budget binds nobody.
        key: float(np.mean([np.mean(np.abs(own[i])) for i in learning.ENERGY[1:]]))
        for key, own in over.items()
    }
    claims.append(
        Claim(
            "MEG-CVPO's energy is closer under its budget than PPO-Lagrangian's",
            "V-B2, Fig. 7",
            [_value(LEARNERS[k], number(v, "modelled", "% away")) for k, v in gaps.items()],
            "its mean absolute gap over seeds and the two budgets that bind is smaller, and it keeps all",
            _verdict(gaps["cvpo"] < gaps["ppo"] and max(max(v) for v in over["cvpo"].values()) <= WITHIN),
        )
    )
    order = [float(mse["cvpo"][i].mean()) for i in (loose, middle, tight)]
    claims.append(
        Claim(
            "MEG-CVPO trades quality against latency at will",
            "abstract, V-B2",
            [_value(n, number(m, "measured")) for n, m in zip(learning.NAMES, order, strict=True)],
            "its MSE, a geometric mean over frames, grows from the loose to the tight limit",
            _verdict(order[0] < order[1] < order[2]),
        )
    )
    return claims


def _limit_name(found: Any, limit: int, energy: bool) -> str:
    which = int(energy)
    return f"limit {found['limits'][limit][which]:g} {learning.UNITS[which]}"


def _excess(found: Any, trained: Any, *, energy: bool) -> dict[int, list[float]]:
    """Return each seed's per cent over each limit, of its mean energy or of its mean latency."""
    excess: dict[int, list[float]] = {}
    which = int(energy)
    about = learning.ENERGY if energy else learning.LATENCY
    for run in (run for run in trained["runs"] if run["limit"] in about):
        bound = found["limits"][run["limit"]][which]
        excess.setdefault(run["limit"], []).append(100 * (run["deterministic"]["costs"][which] / bound - 1))
    return excess


def _mse(trained: Any) -> dict[int, np.ndarray]:
    limits = {run["limit"] for run in trained["runs"]}
    return {
        i: np.exp([-run["deterministic"]["reward"] for run in learning.runs_of(trained, i)]) for i in limits
    }


def _settled(trained: Any, limit: int) -> list[float]:
    """Return the million frames until each seed's MSE comes and stays within a factor of its last."""
    found = []
    for run in learning.runs_of(trained, limit):
        log_mse = -np.asarray(run["reward"])
        outside = np.flatnonzero(np.abs(log_mse - log_mse[-1]) > np.log(SETTLED))
        first = outside[-1] + 1 if len(outside) else 0
        found.append(run["epochs"][first] * trained["frames_per_epoch"] / 1e6)
    return found


def _seeds_ratio(values: np.ndarray, over: np.ndarray) -> Interval:
    """Return the ratio of two sets of seeds' means, between those of their best and worst."""
    return Interval(
        float(values.mean() / over.mean()),
        float(values.min() / over.max()),
        float(values.max() / over.min()),
    )


def untestable(context: Context) -> list[Claim]:
    """Return what this run cannot decide."""
    never: list[tuple[str, str, str]] = [
        (
            "Exchanging features preserves the user's privacy",
            "section I",
            "no attack on features is measured",
        ),
    ]
    if context.sample_size < SDXL_LATENT[0]:
        why = f"the pictures are {context.config.model}'s; run the preset sdxl"
        never.insert(0, ("The same quality holds for SDXL's pictures at 1024 × 1024", "V-B1", why))
    return [Claim(text, where, [], why, "not testable here") for text, where, why in never]
