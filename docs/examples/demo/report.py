"""What the demo saw, as a table and as a picture."""

from collections.abc import Sequence
from pathlib import Path
from statistics import quantiles
from typing import Any

import attrs
import matplotlib as mpl
from load import Request
from watch import Sample, Watch

from modelcache import Evicted, Loaded

mpl.use("Agg")
from matplotlib import pyplot as plt

MIB = 2**20
INK, HIT, MISS, USED, HIGH = "#22303c", "#2a7f9e", "#d1495b", "#8fb8c9", "#e08e0b"


@attrs.frozen
class Phase:
    """One stretch of load under one threshold.

    Attributes:
        name: what it shows.
        began, ended: monotonic seconds.
        requests: answered meanwhile.
        first, last: figures at its two ends.
    """

    name: str
    began: float
    ended: float
    requests: Sequence[Request]
    first: Sample
    last: Sample


def phase(name: str, began: float, ended: float, requests: Sequence[Request], watch: Watch) -> Phase:
    """Return what happened between two moments."""
    mine = [request for request in requests if began <= request.at < ended]
    samples = [sample for sample in watch.samples if began <= sample.at < ended]
    return Phase(name, began, ended, mine, samples[0], samples[-1])


def rows(phases: Sequence[Phase]) -> list[tuple[str, ...]]:
    """Return the lines of the table: a label, and a figure for each phase."""
    columns = [_figures(one) for one in phases]
    return [(label, *(column[label] for column in columns)) for label in columns[0]]


def _figures(one: Phase) -> dict[str, str]:
    hits = [request.seconds for request in one.requests if request.hit]
    misses = [request.seconds for request in one.requests if not request.hit]
    waited = sum(request.waited for request in one.requests if not request.hit)
    total = sum(request.seconds for request in one.requests)
    return {
        "requests": f"{len(one.requests):,}",
        "requests a second": f"{len(one.requests) / (one.ended - one.began):.0f}",
        "answered from memory (hits)": f"{len(hits) / max(len(one.requests), 1):.1%}",
        "models loaded": f"{one.last.loads - one.first.loads:,}",
        "models evicted": f"{one.last.evictions - one.first.evictions:,}",
        "hit: median, p99": _latency(hits),
        "miss: median, p99 (how many)": f"{_latency(misses)} ({len(misses):,})",
        "time spent waiting for models": f"{waited / total if total else 0:.1%}",
        "memory used / threshold": f"{one.last.used / MIB:.0f} / {one.last.high / MIB:.0f} MiB",
    }


def _latency(seconds: list[float]) -> str:
    if len(seconds) < 2:  # noqa: PLR2004 - what quantiles takes
        return "-" if not seconds else f"{seconds[0] * 1000:.0f} ms"
    cuts = quantiles(seconds, n=100, method="inclusive")
    return f"{cuts[49] * 1000:.0f} ms, {cuts[98] * 1000:.0f} ms"


def draw(path: Path, before: Phase, after: Phase, watch: Watch, note: str) -> None:
    """Draw the timeline of both phases, with a note on what was loaded, and save it as a PNG."""
    zero, raised, end = before.began, after.began, after.ended
    plt.rcParams.update({"font.size": 10, "axes.edgecolor": "#9aa5ad", "text.color": INK, "axes.labelcolor": INK})
    figure, (memory, swaps, latency) = plt.subplots(
        3, 1, figsize=(11, 7.6), sharex=True, height_ratios=[5, 1.5, 4], layout="constrained"
    )
    figure.suptitle("Raise the memory threshold on the running server, and swapping stops", size=14, weight="bold")
    _draw_memory(memory, watch, zero, raised, end)
    for one, name in ((before, "(a) threshold too low"), (after, "(b) threshold raised")):
        share = sum(request.hit for request in one.requests) / max(len(one.requests), 1)
        text = f"{name}\n{share:.0%} of requests find their model in memory"
        middle = (one.began + one.ended) / 2 - zero
        memory.text(middle, 1.02, text, transform=memory.get_xaxis_transform(), ha="center", va="bottom")
    _draw_swaps(swaps, watch, zero, end)
    _draw_latency(latency, [*before.requests, *after.requests], zero)
    latency.set_xlabel(f"seconds of load ({note})")
    latency.set_xlim(0, end - zero)
    for axes in (memory, swaps, latency):
        axes.axvline(raised - zero, color=INK, linewidth=1.4)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_memory(axes: Any, watch: Watch, zero: float, raised: float, end: float) -> None:
    samples = [sample for sample in watch.samples if zero <= sample.at <= end]
    at = [sample.at - zero for sample in samples]
    axes.fill_between(at, [sample.used / MIB for sample in samples], color=USED, alpha=0.75, linewidth=0)
    axes.step(at, [sample.high / MIB for sample in samples], where="post", color=HIGH, linewidth=2.2)
    axes.step(at, [sample.low / MIB for sample in samples], where="post", color=HIGH, linewidth=1.2, linestyle="--")
    first, last = samples[0], samples[-1]
    base = watch.samples[0].used / MIB
    top = last.high / MIB * 1.1
    axes.set_ylim(0, top)
    axes.set_ylabel("memory (MiB)")
    axes.text(0.3, first.high / MIB + top * 0.015, "high: above this, models are evicted", color=HIGH, va="bottom")
    box = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1.5}
    low = "low: growth from outside is answered down to here"
    axes.text(0.3, first.low / MIB - top * 0.03, low, color=HIGH, va="top", bbox=box)
    axes.axhline(base, color=INK, linewidth=0.8, linestyle=":")
    axes.text(0.3, base - top * 0.03, "the server without any model", va="top")
    axes.text(at[-1] * 0.985, (base + last.used / MIB) / 2, "memory the server uses", ha="right", weight="bold")
    axes.annotate(
        "threshold raised\non the running server",
        (raised - zero, (first.high + last.high) / 2 / MIB),
        (raised - zero - 1.2, last.high / MIB * 0.8),
        ha="right",
        va="center",
        arrowprops={"arrowstyle": "->", "color": INK},
    )


def _draw_swaps(axes: Any, watch: Watch, zero: float, end: float) -> None:
    for height, kind, colour in ((1, Loaded, HIT), (0, Evicted, MISS)):
        moments = [moment - zero for moment in watch.moments(kind) if zero <= moment <= end]
        axes.eventplot(moments, lineoffsets=height, linelengths=0.75, linewidths=1, colors=colour)
    axes.set_yticks([1, 0], ["model loaded", "model evicted"])
    axes.set_ylim(-0.55, 1.55)
    axes.tick_params(axis="y", length=0)


def _draw_latency(axes: Any, requests: Sequence[Request], zero: float) -> None:
    for hit, colour, label, size in (
        (True, HIT, "model in memory (hit)", 3),
        (False, MISS, "model had to be loaded first (miss)", 7),
    ):
        mine = [request for request in requests if request.hit is hit]
        at, taken = [request.at - zero for request in mine], [request.seconds * 1000 for request in mine]
        axes.scatter(at, taken, s=size, color=colour, alpha=0.45, linewidths=0, label=label, rasterized=True)
    axes.set_yscale("log")
    axes.set_ylabel("a request takes (ms)")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.grid(axis="y", color="#e4e8ea")
    axes.set_axisbelow(True)
    legend = axes.legend(loc="lower left", markerscale=3, frameon=True, edgecolor="none")
    for handle in legend.legend_handles:
        handle.set_alpha(1)
