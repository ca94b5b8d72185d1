"""A stacked bar of one rank's memory for each phase, for `--picture`. The one place that draws, with matplotlib."""

import os
from pathlib import Path
from typing import Any

from burnish.errors import UserError
from burnish.plan.report import Phase, Report
from burnish.runs import write_whole

SMALL = 0.02
"""Parts below this share of each bar that they are in are drawn as one."""
REST = "all else"
ENDINGS = (".png", ".pdf", ".svg")


def check_drawable(path: Path) -> None:
    """Raises a `UserError` without matplotlib, or where no ending says the format: before the plan, which takes longer."""
    if path.suffix.lower() not in ENDINGS:
        raise UserError(f"--picture {path}: the ending says the format. Give it one of {', '.join(ENDINGS)}.")
    if not os.access(path.absolute().parent, os.W_OK):
        raise UserError(f"--picture {path}: there is no folder {path.absolute().parent} that can be written to. Make it, or name another.")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise UserError("--picture needs matplotlib. Install it: pip install matplotlib (burnish's extra `plots` has it).") from None


def draw(report: Report, path: Path, model: str) -> None:
    """Writes the picture in the format that its ending names. `model`: what the title calls the base."""
    from matplotlib.figure import Figure

    bars = [phase for phase in report.phases if phase.place != "disk"]
    figure = Figure(figsize=(2 + 1.6 * len(bars), 5), layout="constrained")
    _draw(figure.subplots(), bars, report, model)
    ending = path.suffix.lower().removeprefix(".")
    write_whole(path, lambda temporary: figure.savefig(temporary, format=ending, dpi=150))


def stacked(bars: list[Phase]) -> dict[str, list[float]]:
    """GB of each part in each bar, the parts in the order in which they first come; small ones are put together at the end."""
    large = {part.name for phase in bars for part in phase.parts if part.bytes >= SMALL * phase.bytes}
    parts: dict[str, list[float]] = {}
    rest = [0.0] * len(bars)
    for place, phase in enumerate(bars):
        for part in phase.parts:
            if part.name in large:
                parts.setdefault(part.name, [0.0] * len(bars))[place] += part.bytes / 1e9
            else:
                rest[place] += part.bytes / 1e9
    return parts | ({REST: rest} if any(rest) else {})


def _draw(axes: Any, bars: list[Phase], report: Report, model: str) -> None:
    places = list(range(len(bars)))
    below = [0.0] * len(bars)
    for number, (name, sizes) in enumerate(stacked(bars).items()):
        colour = "lightgrey" if name == REST else f"C{number % 10}"
        axes.bar(places, sizes, bottom=below, label=name, color=colour, width=0.6, hatch="//" if number >= 10 else None)
        below = [low + size for low, size in zip(below, sizes, strict=True)]
    for place, phase in enumerate(bars):
        axes.hlines(phase.limit_bytes / 1e9, place - 0.4, place + 0.4, colors="black" if phase.fits else "red", linestyles="dashed")
        axes.text(place, below[place], f"{below[place]:.1f}", ha="center", va="bottom")
    axes.set_xticks(places, [f"{phase.name}\n({phase.place})" for phase in bars])
    axes.set_ylabel("GB on one rank; dashed: what there is")
    verdict = "fits" if report.fits else "does not fit"
    axes.set_title(f"{model} on {report.machine.name}\n{report.plan.strategy} on {report.plan.ranks}: {verdict}")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize="small", reverse=True)
