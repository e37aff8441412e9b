"""From runs to tables, a sentence and a picture. The same runs give the same text, bit for bit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

from distill_sampler.compare.arms import ARMS
from distill_sampler.compare.measures import MEASURES, gains, losses_by_teacher, measured
from distill_sampler.compare.runner import Run
from distill_sampler.compare.statistics import Contrast, Estimate, contrasts, estimate
from distill_sampler.types import FloatArray

Measured = Mapping[tuple[str, int], Mapping[str, Mapping[str, float]]]
"""By arm and seed: by measure, a number for each prompt."""
PRIMARY = next(iter(MEASURES))


def measured_runs(runs: Sequence[Run]) -> dict[tuple[str, int], dict[str, dict[str, float]]]:
    """What each run was measured at."""
    found = {}
    for run in runs:
        solved = {"solved": {prompt: float(value) for prompt, value in run.solved.items()}} if run.solved else {}
        found[run.arm, run.seed] = measured(run.answers) | solved
    return found


def paired(found: Measured, measure: str, arm: str, control: str) -> list[FloatArray]:
    """For each seed that has both arms, `[prompts]` how much better the arm is than the control."""
    seeds = sorted(seed for name, seed in found if name == arm and (control, seed) in found)
    both = ((found[arm, seed].get(measure, {}), found[control, seed].get(measure, {})) for seed in seeds)
    return [each for each in (gains(measure, *pair) for pair in both) if len(each)]


def judged(found: Measured, subject: str, controls: Sequence[str], margin: float) -> list[Contrast]:
    """The subject against each control that has runs, by the primary measure."""
    differences = {(subject, control): paired(found, PRIMARY, subject, control) for control in controls}
    return contrasts({pair: each for pair, each in differences.items() if each}, margin=margin)


def verdict(contrast: Contrast) -> str:
    """One sentence on the first contrast."""
    what = contrast.control.replace("_", " ")
    if contrast.control == "matched_random":
        what = "random responses of the same teachers"
    if contrast.seeds < 2:
        return f"One seed says nothing about {contrast.arm} against {what}: run at least two."
    beat = {"better": "beat", "worse": "was worse than"}.get(contrast.verdict.split(",")[0], "did not beat")
    seen = f"a true difference of {contrast.detectable:.3f} nats would have been seen with probability 0.8"
    less = f", and the 90 % interval shows the difference to be less than {contrast.margin:g}"
    less = less if contrast.equivalent else ""
    return (
        f"{contrast.arm} {beat} {what} ({_signed(contrast.difference)} nats per token of correct answers, 95 % "
        f"interval {_interval(contrast.low, contrast.high)}, {contrast.seeds} seeds){less}; {seen}."
    )


def tables(runs: Sequence[Run], *, subject: str, controls: Sequence[str], margin: float) -> str:
    """All tables in Markdown: the arms, the contrasts, and whose answers have become likely.

    Args:
        runs: at least one.
        subject: the arm in question.
        controls: what it is compared with, fixed before looking.
        margin: differences below this, in nats per token, count as none.
    """
    found = measured_runs(runs)
    arms = list(dict.fromkeys(run.arm for run in sorted(runs, key=lambda run: _place(run.arm))))
    parts = [_arms_table(runs, found, arms, subject, controls)]
    every = judged(found, subject, controls, margin)
    if every:
        parts += [_contrast_table(every), verdict(every[0]), _unequal_steps(runs, [subject, *controls])]
        parts.append(_other_measures(found, subject, controls))
    parts.append(_circular(runs, arms))
    return "\n\n".join(part for part in parts if part) + "\n"


def costs(runs: Sequence[Run], scoring: tuple[int, float] | None) -> str:
    """What the runs took, in Markdown. Seconds differ from machine to machine, so they are no part of `tables`."""
    parts = {"training": "training", "measuring": "measuring", "answering": "answering", "scoring": "scoring again"}
    parts = {name: what for name, what in parts.items() if any(name in run.seconds for run in runs)}
    lines = ["| arm | " + " | ".join(f"seconds of {what}" for what in parts.values()) + " |"]
    lines.append("|---|" + "---:|" * len(parts))
    for arm in sorted({run.arm for run in runs}, key=_place):
        of_arm = [run.seconds for run in runs if run.arm == arm]
        cells = [np.mean([each.get(name, 0.0) for each in of_arm]) for name in parts]
        lines.append(f"| {arm} | " + " | ".join(f"{cell:.0f}" for cell in cells) + " |")
    if scoring is not None:
        lines.append(
            f"\nScoring all candidates once, for all arms and seeds: {scoring[0]:,} tokens, {scoring[1]:.0f} s."
        )
    return "\n".join(lines) + "\n"


def _arms_table(
    runs: Sequence[Run], found: Measured, arms: Sequence[str], subject: str, controls: Sequence[str]
) -> str:
    reference = "random" if "random" in arms else next((name for name in controls if name in arms), subject)
    names = [name for name in MEASURES if any(name in each for each in found.values())]
    head = ["arm", "seeds", "samples", "response tokens", "steps", *(MEASURES[name][0] for name in names)]
    lines = [_row([*head, f"gain over {reference} [95 %]"]), "|---|" + "---:|" * len(head)]
    for arm in arms:
        of_arm = [run for run in runs if run.arm == arm]
        counts = [np.mean([getattr(run, name) for run in of_arm]) for name in ("samples", "response_tokens", "steps")]
        values = []
        for name in names:
            means = [
                np.mean(list(found[arm, run.seed][name].values())) for run in of_arm if name in found[arm, run.seed]
            ]
            values.append(f"{np.mean(means):.3f}" if means else "")
        differences = paired(found, PRIMARY, arm, reference) if arm != reference else []
        gain = _of(estimate(differences)) if differences else ""
        lines.append(_row([arm, str(len(of_arm)), *(f"{count:,.0f}" for count in counts), *values, gain]))
    return "\n".join(lines)


def _unequal_steps(runs: Sequence[Run], arms: Sequence[str]) -> str:
    """A sentence if arms of equal tokens took more steps than others by a tenth or more."""
    steps = {arm: float(np.mean([run.steps for run in runs if run.arm == arm])) for arm in {run.arm for run in runs}}
    few, many = (of((steps[arm], arm) for arm in arms if arm in steps) for of in (min, max))
    if many[0] < 1.1 * few[0]:
        return ""
    return (
        f"The arms took {few[0]:.0f} ({few[1]}) to {many[0]:.0f} ({many[1]}) optimizer steps, because short responses "
        "give more samples for the same tokens. This alone can make a difference: look at `--unit samples` too."
    )


def _contrast_table(every: Sequence[Contrast]) -> str:
    lines = [
        f"| {every[0].arm} against | gain in nats [95 %] | p | p, Holm | could have been seen | verdict |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for one in every:
        gain = f"{_signed(one.difference)} {_interval(one.low, one.high)}"
        cells = [one.control, gain, f"{one.p:.3f}", f"{one.p_holm:.3f}", _number(one.detectable), one.verdict]
        lines.append(_row(cells))
    lines.append(
        f"\nPositive: {every[0].arm} is better. Equivalent: the 90 % interval is within ±{every[0].margin:g} nats. "
        "Could have been seen: the smallest true difference found with probability 0.8, all contrasts together at 5 %."
    )
    return "\n".join(lines)


def _other_measures(found: Measured, subject: str, controls: Sequence[str]) -> str:
    names = [name for name in MEASURES if name != PRIMARY and any(name in each for each in found.values())]
    if not names:
        return ""
    head = [f"{subject} against", *(f"gain in {MEASURES[name][0]} [95 %]" for name in names)]
    lines = [_row(head), "|---|" + "---:|" * len(names)]
    for control in controls:
        cells = [paired(found, name, subject, control) for name in names]
        if any(cells):
            lines.append(_row([control, *(_of(estimate(each)) if each else "" for each in cells)]))
    return "\n".join([*lines, "\nSecondary measures: intervals only, not adjusted for their number."])


def _circular(runs: Sequence[Run], arms: Sequence[str]) -> str:
    teachers = sorted({teacher for run in runs for teacher in losses_by_teacher(run.answers)})
    lines = [_row(["loss of the answers of", *teachers]), "|---|" + "---:|" * len(teachers)]
    for arm in arms:
        of_arm = [losses_by_teacher(run.answers) for run in runs if run.arm == arm]
        means = [[each[teacher] for each in of_arm if teacher in each] for teacher in teachers]
        lines.append(_row([arm, *(f"{np.mean(losses):.3f}" if losses else "" for losses in means)]))
    return "\n".join([*lines, "\nCircular: a low loss here shows whom an arm has copied, not that it is good."])


def picture(runs: Sequence[Run], *, subject: str, controls: Sequence[str], margin: float) -> str:
    """The contrasts as an SVG: gains with their 95 % intervals, and the margin as a band.

    Raises:
        ValueError: no contrast has two seeds, so there is no interval to draw.
    """
    every = [one for one in judged(measured_runs(runs), subject, controls, margin) if one.seeds > 1]
    if not every:
        raise ValueError("A picture needs two seeds of the subject and of a control.")
    largest = max(margin, *(max(abs(one.low), abs(one.high)) for one in every)) * 1.1
    left, right, top, gap = 190, 690, 30, 38
    bottom = top + gap * len(every)

    def x(value: float) -> float:
        return (left + right) / 2 + value / largest * (right - left) / 2

    marks = [
        f'<rect x="{x(-margin):.1f}" y="{top}" width="{x(margin) - x(-margin):.1f}" height="{bottom - top}" '
        'class="band"/>',
        f'<line x1="{x(0):.1f}" x2="{x(0):.1f}" y1="{top}" y2="{bottom}" class="zero"/>',
    ]
    for tick in _ticks(largest):
        marks.append(f'<text x="{x(tick):.1f}" y="{bottom + 20}" text-anchor="middle">{tick:+g}</text>')
    for place, one in enumerate(every):
        y = top + gap * (place + 0.5)
        marks.append(f'<line x1="{x(one.low):.1f}" x2="{x(one.high):.1f}" y1="{y}" y2="{y}" class="interval"/>')
        marks.append(f'<circle cx="{x(one.difference):.1f}" cy="{y}" r="5"/>')
        name = escape(one.control.replace("_", " "))
        marks.append(f'<text x="{left - 14}" y="{y + 4}" class="name" text-anchor="end">{name}</text>')
    return SVG.format(
        height=bottom + 56,
        title=escape(f"{subject} against its controls"),
        marks="\n  ".join(marks),
        middle=(left + right) / 2,
        low=bottom + 44,
        label=escape(f"gain of {subject}, nats per token (95 % interval; band: margin)"),
    )


SVG = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 {height}" font-family="system-ui, sans-serif" font-size="13">
  <title>{title}</title>
  <style>
    text {{ fill: #7d8590 }} .name {{ font-weight: 600 }} circle {{ fill: #2f81f7 }}
    .interval {{ stroke: #2f81f7; stroke-width: 2 }} .zero {{ stroke: #7d8590 }}
    .band {{ fill: #7d8590; fill-opacity: 0.18 }}
  </style>
  {marks}
  <text x="{middle}" y="{low}" text-anchor="middle">{label}</text>
</svg>
"""


def _ticks(largest: float) -> list[float]:
    step = 10 ** math.floor(math.log10(largest))
    step = step if largest / step >= 2 else step / 2
    return [round(place * step, 9) for place in range(-int(largest / step), int(largest / step) + 1)]


def _place(arm: str) -> tuple[int, str]:
    return (ARMS.index(arm) if arm in ARMS else len(ARMS), arm)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _of(one: Estimate) -> str:
    return f"{_signed(one.mean)} {_interval(*one.interval())}"


def _number(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "unknown"


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def _interval(low: float, high: float) -> str:
    if not (math.isfinite(low) and math.isfinite(high)):
        return "[one seed: unknown]"
    return f"[{_signed(low)}, {_signed(high)}]"
