"""report.html: one page about a run, with its curves over the whole chain. Needs no server, script or network."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.snapshot import read_manifest
from jobs.status import RunStatus, read_status
from jobs.status_view import COLUMNS, accepted_by_source, cells, compared_models, remark
from mixture.whole_files import write_whole
from training.run_folder import RunFolder

WIDTH, HEIGHT = 640, 220
LEFT, RIGHT, TOP, BOTTOM = 64, 12, 12, 28
MAX_POINTS = 600

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1360px; margin: 2em auto; padding: 0 1em; color: #1c2430; }
h1 { font-size: 1.5em; margin-bottom: 0; } h2 { font-size: 1.1em; margin-top: 2em; }
.curves { display: flex; flex-wrap: wrap; gap: 1em; } figure { margin: 0; } figcaption { font-weight: 600; }
table { border-collapse: collapse; } th, td { text-align: left; padding: .2em 1em .2em 0; vertical-align: top; }
th { border-bottom: 1px solid #ccd3dc; } pre { background: #f4f6f8; padding: 1em; overflow-x: auto; font-size: 13px; }
.halted { color: #b3261e; } .note { color: #5b6675; }
svg text { font: 11px system-ui, sans-serif; fill: #5b6675; }
"""


@dataclass(frozen=True)
class Curve:
    """One line of a chart: (step, value) pairs, drawn as a line or, where there are few, as dots too."""

    points: Sequence[tuple[float, float]]
    colour: str
    dots: bool = False


def write_report(run: RunFolder) -> Path:
    """Write the run's report.html and return its path."""
    path = run.path / "report.html"
    write_whole(path, report_page(run).encode(), synced=True)
    return path


def report_page(run: RunFolder) -> str:
    """The page as text."""
    status = read_status(run)
    metrics = last_line_of_each_step(run)
    ends = [event for event in run.events() if event["event"] == "block_end"]
    boundaries = [event["step"] for event in ends]
    test_loss = series(ends, "eval_loss")
    charts = [
        chart(
            "Loss (line: training, dots: test split at block ends)",
            [Curve(series(metrics, "loss"), "#2f6fde"), Curve(test_loss, "#d9541e", dots=True)],
            boundaries,
        ),
        chart("Learning rate", [Curve(series(metrics, "lr"), "#2f6fde")], boundaries),
        chart("Tokens per second", [Curve(series(metrics, "tokens_per_s"), "#2f6fde")], boundaries),
        chart("Gradient norm", [Curve(series(metrics, "grad_norm"), "#2f6fde")], boundaries),
    ]
    if metrics and "divergence" in metrics[-1]:
        parts = [Curve(series(metrics, "cross_entropy"), "#2f6fde"), Curve(series(metrics, "divergence"), "#d9541e")]
        charts.insert(1, chart("Cross entropy (blue) and divergence from the teacher (red)", parts, boundaries))
    if metrics and "margin" in metrics[-1]:
        for key, title in (("accuracy", "Preferences: accuracy"), ("margin", "Preferences: margin of rewards")):
            parts = [Curve(series(metrics, key), "#2f6fde"), Curve(series(ends, f"eval_{key}"), "#d9541e", dots=True)]
            charts.append(chart(f"{title} (line: training, dots: test split at block ends)", parts, boundaries))
    if metrics and "reward" in metrics[-1]:
        charts = reward_charts(metrics, ends, boundaries) + charts
    if metrics and "expert_balance" in metrics[-1]:
        charts.append(
            chart("Balance of the experts (1: even)", [Curve(series(metrics, "expert_balance"), "#2f6fde")], boundaries)
        )
        charts.append(chart("Share of the work of each expert", expert_curves(metrics), boundaries))
    name = html.escape(run.path.name)
    return "\n".join(
        [
            f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{name}</title>",
            f"<style>{STYLE}</style></head><body>",
            f"<h1>{name}</h1><p class='{html.escape(status.state)}'>{html.escape(summary(status))}</p>",
            f"<div class='curves'>{''.join(charts)}</div>",
            evaluation_section(status.evaluation),
            jobs_section(status),
            f"<h2>Settings</h2><pre>{html.escape(run.config.read_text(encoding='utf-8'))}</pre>",
            f"<h2>Made with</h2><pre>{html.escape(provenance(run))}</pre>",
            "</body></html>\n",
        ]
    )


REWARD_CHARTS = {
    "answer_tokens": "Tokens of an answer",
    "zero_std_share": "Share of prompts whose answers are all worth the same",
    "cut_share": "Share of answers that came to no end",
    "entropy": "Entropy of a token, in nats",
    "kl": "KL divergence from the model before, in nats a token",
    "clip_share": "Share that was clipped",
}


def reward_charts(
    metrics: Sequence[dict[str, Any]], ends: Sequence[dict[str, Any]], boundaries: Sequence[int]
) -> list[str]:
    """The reward of a model's own answers, each of several rewards, and what tells how it is won."""
    held_out = Curve(series(ends, "eval_reward"), "#d9541e", dots=True)
    title = "Mean reward (line: training, dots: test split at block ends)"
    charts = [chart(title, [Curve(series(metrics, "reward"), "#2f6fde"), held_out], boundaries)]
    parts = [name for name in metrics[-1] if name.startswith("reward_") and name != "reward_std"]
    titles = {name: f"Mean reward by {name.removeprefix('reward_')}" for name in parts if len(parts) > 1}
    for name, title in {**titles, **REWARD_CHARTS}.items():
        if name in metrics[-1]:
            charts.append(chart(title, [Curve(series(metrics, name), "#2f6fde")], boundaries))
    return charts


def last_line_of_each_step(run: RunFolder) -> list[dict[str, Any]]:
    """The metrics in the order of their steps; of steps that were repeated after a crash, the last try."""
    by_step = {line["step"]: line for line in run.metrics()}
    return [by_step[step] for step in sorted(by_step)]


def series(metrics: Sequence[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    """(step, value) pairs, thinned to what a screen can show; the last one always stays."""
    points = [(line["step"], line[key]) for line in metrics if is_number(line.get(key))]
    stride = max(1, math.ceil(len(points) / MAX_POINTS))
    return points[::stride] + (points[-1:] if (len(points) - 1) % stride else [])


def expert_curves(metrics: Sequence[dict[str, Any]]) -> list[Curve]:
    """A curve for each expert, in as many colours."""
    names = [name for name in metrics[-1] if re.fullmatch(r"expert_\d+", name)]
    return [Curve(series(metrics, name), f"hsl({360 * n // len(names)} 70% 45%)") for n, name in enumerate(names)]


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def chart(title: str, curves: Sequence[Curve], boundaries: Sequence[int]) -> str:
    """A figure with an inline SVG; dashed lines are block boundaries."""
    points = [point for curve in curves for point in curve.points]
    if not points:
        return f"<figure><figcaption>{html.escape(title)}</figcaption><p class='note'>nothing yet</p></figure>"
    last_step = max(1.0, *(step for step, _ in points))
    low, high = min(value for _, value in points), max(value for _, value in points)
    if low == high:
        low, high = low - (abs(low) / 2 or 1), high + (abs(high) / 2 or 1)

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / last_step

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low)

    marks = [
        f"<text x='{LEFT - 6}' y='{y(value) + 4:.1f}' text-anchor='end'>{value:.4g}</text>"
        f"<line x1='{LEFT}' x2='{WIDTH - RIGHT}' y1='{y(value):.1f}' y2='{y(value):.1f}' stroke='#e4e8ed'/>"
        for value in (low, (low + high) / 2, high)
    ]
    marks += [
        f"<line x1='{x(step):.1f}' x2='{x(step):.1f}' y1='{TOP}' y2='{HEIGHT - BOTTOM}' stroke='#b8c0ca' "
        "stroke-dasharray='3 3'/>"
        for step in boundaries
        if step <= last_step
    ]
    marks.append(f"<text x='{WIDTH - RIGHT}' y='{HEIGHT - 8}' text-anchor='end'>step {last_step:.0f}</text>")
    for curve in curves:
        path = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in curve.points)
        marks.append(f"<polyline points='{path}' fill='none' stroke='{curve.colour}' stroke-width='1.5'/>")
        if curve.dots:
            marks += [
                f"<circle cx='{x(step):.1f}' cy='{y(value):.1f}' r='3.5' fill='{curve.colour}'/>"
                for step, value in curve.points
            ]
    svg = f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' width='{WIDTH}' height='{HEIGHT}' role='img'>{''.join(marks)}</svg>"
    return f"<figure><figcaption>{html.escape(title)}</figcaption>{svg}</figure>"


def summary(status: RunStatus) -> str:
    """Where the run stands, in one line."""
    horizon = f" of {status.horizon_steps}" if status.horizon_steps else ""
    parts = [f"{status.state}{': ' + status.detail if status.detail else ''}", f"step {status.step}{horizon}"]
    if status.loss is not None:
        parts.append(f"loss {status.loss:.4f}")
    return ", ".join(parts)


def evaluation_section(evaluation: dict[str, Any] | None) -> str:
    """The scores, and a few answers beside what was expected."""
    if evaluation is None:
        return ""
    scores = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{value:.6g}</td></tr>"
        for name, value in evaluation.items()
        if is_number(value)
    )
    examples = "".join(
        "<tr>" + "".join(f"<td>{html.escape(str(value))}</td>" for value in example.values()) + "</tr>"
        for example in evaluation.get("examples", [])
    )
    headings = "".join(f"<th>{html.escape(key)}</th>" for key in next(iter(evaluation.get("examples", [])), {}))
    answers = f"<h2>Some answers</h2><table><tr>{headings}</tr>{examples}</table>" if examples else ""
    tasks = list(evaluation.get("lm_eval", {}).items())
    harness = score_table("Tasks of lm-evaluation-harness", "task", tasks) if tasks else ""
    return f"<h2>Evaluation</h2><table>{scores}</table>{comparison(evaluation)}{harness}{answers}"


def comparison(evaluation: dict[str, Any]) -> str:
    """A table of the models that were compared, for each category of the test split; of a draft, one of its sources."""
    if by_source := accepted_by_source(evaluation):
        return score_table("Accepted guesses by source", "source", by_source)
    categories = dict.fromkeys(name for found in evaluation.get("models", {}).values() for name in found)
    compared = {f"Compared on {category}": compared_models(evaluation, category) for category in categories}
    return "".join(score_table(title, "model", found) for title, found in compared.items())


def score_table(title: str, what: str, found_of: Sequence[tuple[str, dict[str, float]]]) -> str:
    """A section with a row for each of several things that have scores."""
    columns = list(dict.fromkeys(name for _, found in found_of for name in found))
    headings = "".join(f"<th>{html.escape(name.replace('_', ' '))}</th>" for name in [what, *columns])
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td>"
        + "".join(f"<td>{found[score]:.4g}</td>" if score in found else "<td></td>" for score in columns)
        + "</tr>"
        for name, found in found_of
    )
    return f"<h2>{html.escape(title)}</h2><table><tr>{headings}</tr>{rows}</table>"


def jobs_section(status: RunStatus) -> str:
    rows = "".join(
        f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in (*cells(row), remark(row)))}</tr>"
        for row in status.jobs
    )
    headings = "".join(f"<th>{heading}</th>" for heading in COLUMNS)
    return f"<h2>Jobs</h2><table><tr>{headings}</tr>{rows}</table>"


def provenance(run: RunFolder) -> str:
    """Versions and code state, a fact a line."""
    facts = read_manifest(run.manifest)
    lines = [f"created {facts['created']}", f"Python {facts['python']}"]
    lines += [f"{name} {version}" for name, version in facts["packages"].items()]
    if facts["git"]:
        lines.append(f"commit {facts['git']['commit']}, {len(facts['git']['changed_files'])} files changed since")
    lines.append(f"data {facts['data_key']}")
    return "\n".join(lines)
