"""Figs. 6 and 7 and the Pareto front: what both algorithms learn under their limits, against the optimum."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from eval.suite import methods, physical
from eval.suite.context import Context, get
from eval.suite.measure import chosen
from eval.suite.numbers import Record, axis, geometric, interval, line, number, span
from eval.suite.policies import LEARNERS, Learner, choice, counts, problem, training
from megjax.link.profiles import load

LATENCY, ENERGY = (0, 1, 2), (0, 3, 4)
"""Limits of Figs. 6 and 7 among the problem's: loose, middle, tight."""
NAMES = ("loose", "middle", "tight")
UNITS = ("s", "kJ")


def fig6(context: Context) -> Record:
    """Return Fig. 6: MSE and latency while both algorithms learn, at three latency limits."""
    return _item(context, "fig6", LATENCY, 0)


def fig7(context: Context) -> Record:
    """Return Fig. 7: energy while both algorithms learn, at three energy budgets."""
    return _item(context, "fig7", ENERGY, 1)


def runs_of(trained: Any, limit: int) -> list[Any]:
    """Return the seeds' runs at a limit."""
    return [run for run in trained["runs"] if run["limit"] == limit]


def _item(context: Context, name: str, limits: tuple[int, ...], which: int) -> Record:
    config, found = context.config, get(context, problem(context.config))
    trained: dict[Learner, Any] = {key: get(context, training(config, key)) for key in LEARNERS}
    what = ("latency", "energy")[which]
    panels = []
    for signal in ("mse", what):
        panels += [_panel(found, own, key, limits, signal, which) for key, own in trained.items()]
    title = ("Learning under latency limits", "Learning under energy budgets")[which]
    return {
        "text": [_about(context, found)],
        "tables": [_final_table(context, name, found, trained, limits, which)],
        "figures": [
            {
                "id": name,
                "title": title,
                "caption": f"{_joined(context)} Curves are means over epochs of the policies as they "
                f"explore, over {config.seeds} seeds; bands from the lowest seed to the highest. Dashed: the "
                f"optimum by linear programme (above) and the limit on mean {what} (below), in each limit's "
                "colour.",
                "alt": f"MSE and mean {what} during training of MEG-CVPO and PPO-Lagrangian at three limits.",
                "columns": 2,
                "panels": panels,
            }
        ],
    }


def _joined(context: Context) -> str:
    config = context.config
    return (
        f"Two sources joined: the MSE behind the reward is measured on {config.model} at "
        f"{config.feature_psnr_db:g} dB PSNR; latency and energy are those of {config.charged} under profile "
        f"{config.profile}."
    )


def _about(context: Context, found: Any) -> str:
    lowest = ", ".join(f"{x:.4g} {unit}" for x, unit in zip(found["lowest"], UNITS, strict=True))
    gains = (
        " PPO-Lagrangian's gains are the authors', on an episode's excess as FSRL has them, at 3 s. "
        "As published, means a frame are held against an episode's limit, and the multiplier stays at 0."
        if context.config.rules == "paper"
        else ""
    )
    return (
        f"The lowest reachable means are {lowest}, one at a time. The tight limit is 10 % above; the loose "
        "one is what the best policy without limits costs, and 5 %; the middle one is half-way. Quality is "
        "the geometric mean of the MSE, the exponential of minus the mean reward, over the very pictures "
        f"that the policies learn from: other pictures would shift all of them alike.{gains}"
    )


def _panel(
    found: Any, trained: Any, key: Learner, limits: tuple[int, ...], signal: str, which: int
) -> Record:
    curves, levels = [], []
    for name, limit in zip(NAMES, limits, strict=True):
        own = runs_of(trained, limit)
        frames = np.asarray(own[0]["epochs"]) * trained["frames_per_epoch"] / 1e6
        if signal == "mse":
            values = np.exp(-np.asarray([run["reward"] for run in own]))
            level, tag = math.exp(-found["optimum"][limit]["reward"]), "measured"
        else:
            values = np.asarray([run["costs"] for run in own])[:, :, which]
            level, tag = found["limits"][limit][which], "modelled"
        points = [span(each) for each in values.T]
        label = f"{found['limits'][limit][which]:g} {UNITS[which]}"
        curves.append(line(name, label, frames.tolist(), points, tag))
        levels.append({"axis": "y", "value": level, "series": name, "tag": tag})
    y = axis("MSE, geometric mean", "", "log") if signal == "mse" else axis(signal, UNITS[which])
    return {"title": LEARNERS[key], "x": axis("frames", "million"), "y": y, "lines": curves, "levels": levels,
            "row": signal}  # fmt: skip


def _final_table(
    context: Context, name: str, found: Any, trained: dict[Learner, Any], limits: tuple[int, ...], which: int
) -> Record:
    rows = []
    for limit in limits:
        for key, own in trained.items():
            runs = runs_of(own, limit)
            costs = np.asarray([run["deterministic"]["costs"] for run in runs])[:, which]
            mse = np.exp([-run["deterministic"]["reward"] for run in runs])
            bound = found["limits"][limit][which]
            cells = {
                "limit": number(bound, "modelled", UNITS[which]),
                "mse": interval(span(mse), "measured"),
                "optimum": number(math.exp(-found["optimum"][limit]["reward"]), "measured"),
                "cost": interval(span(costs), "modelled", UNITS[which]),
                "excess": interval(span(100 * (costs / bound - 1)), "modelled", "%"),
            } | _drawn_cells(context, key, limit, which)
            rows.append({"label": f"{LEARNERS[key]}, {bound:g} {UNITS[which]}", "cells": cells})
    what = ("latency", "energy")[which]
    columns = [
        {"key": "mse", "label": "MSE", "unit": "", "digits": 3},
        {"key": "optimum", "label": "optimum", "unit": "", "digits": 3},
        {"key": "cost", "label": what, "unit": UNITS[which], "digits": 4},
        {"key": "limit", "label": "limit", "unit": UNITS[which], "digits": 4},
        {"key": "excess", "label": "over limit", "unit": "%", "digits": 2},
        {"key": "drawn_mse", "label": "MSE of pictures", "unit": "", "digits": 3},
        {"key": "drawn_steps", "label": "mean T", "unit": "", "digits": 3},
        {"key": "drawn_ratio", "label": "mean r", "unit": "", "digits": 3},
        {"key": "drawn_cost", "label": f"their {what}", "unit": UNITS[which], "digits": 4},
    ]
    return {
        "id": f"{name}-final",
        "title": "The trained policies",
        "caption": "On 1000 fresh episodes, the policies' means acting; brackets span the seeds. Right: the "
        f"first seed's policy on the {context.config.pictures} paired channels, its pictures drawn through "
        "the link. All MSEs are geometric means.",
        "columns": columns,
        "rows": rows,
    }


def _drawn_cells(context: Context, key: Learner, limit: int, which: int) -> Record:
    """Return what the first seed's policy makes of the paired channels: pictures drawn, costs charged."""
    config = context.config
    policy = choice(config, key, limit)
    made = get(context, policy)
    drawn = get(context, chosen(config, f"{LEARNERS[key]}, limit {limit + 1}", policy))
    costs = _costs(context, made)
    unit_cost = costs["energy_j"] / 1e3 if which else costs["latency_s"]
    return {
        "drawn_mse": geometric(drawn["mse"]),
        "drawn_steps": number(np.mean(made["steps"]), "modelled"),
        "drawn_ratio": number(np.mean(made["ratios"]), "modelled"),
        "drawn_cost": number(unit_cost.mean(), "modelled", UNITS[which]),
    }


def _costs(context: Context, made: Any) -> dict[str, np.ndarray]:
    config = context.config
    scale = physical.scale(config.physical, get(context, counts(config)), config.guidance)
    compute = physical.computation(load(config.profile), scale, tome=True)
    bits = [methods.bits("meg", scale.latent, ratio, config.rules) for ratio in made["ratios"]]
    snr_P = physical.draw_channels(config.seed, config.pictures)
    return physical.costs(compute, np.asarray(made["steps"]), np.asarray(bits), snr_P)


def pareto(context: Context) -> Record:
    """Return the front of quality against latency and energy: optimum, static envelope, trained policies."""
    config, found = context.config, get(context, problem(context.config))
    trained: dict[Learner, Any] = {key: get(context, training(config, key)) for key in LEARNERS}
    panels = []
    for which, limits in enumerate((LATENCY, ENERGY)):
        front = found["fronts"][which]
        curves = [
            line(
                "optimum", "optimum by linear programme", front["limits"], _db(front["optimum"]), "measured"
            ),
        ]
        static = [(x, y) for x, y in zip(front["limits"], front["constant"], strict=True) if y is not None]
        if static:
            x, y = zip(*static, strict=True)
            curves.append(line("static", "best static policy", x, _db(list(y)), "measured", dash=True))
        for key, own in trained.items():
            runs = [run["deterministic"] for limit in limits for run in runs_of(own, limit)]
            x, y = [run["costs"][which] for run in runs], _db([run["reward"] for run in runs])
            curves.append(line(key, LEARNERS[key], x, y, "measured", points=True))
        label = ("mean latency", "mean energy")[which]
        panels.append({"x": axis(label, UNITS[which]), "y": axis("mean PSNR", "dB"), "lines": curves})
    return {
        "text": [
            "What the limits cost: no policy lies above the optimum on average. The static envelope is the "
            "best single (T, r), blind to the channel; between both lies what watching the channel is worth."
        ],
        "tables": [],
        "figures": [
            {
                "id": "pareto",
                "title": "Quality against latency and energy",
                "caption": f"{_joined(context)} PSNR is its mean over frames. The other cost's limit is "
                "loose. A point is one seed's policy at one of the three limits.",
                "alt": "Mean PSNR against mean latency and against mean energy: optimum, static and trained "
                "policies.",
                "panels": panels,
            }
        ],
    }


def _db(rewards: list[float]) -> list[float]:
    return [10 / math.log(10) * x for x in rewards]
