"""The story that the demo tells on the terminal, step by step, from training to the two phases of load.

How it is started and stopped is ``run``.
"""

import contextlib
import tempfile
import time
from pathlib import Path

import models
from load import CLIENTS, Api, Load, popularity, predict
from report import MIB, draw, phase, rows
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from servers import BUCKET, flask_server, s3_store
from watch import Watch, swaps

from modelcache import Event

PICTURE = Path(__file__).resolve().parents[3] / "build" / "demo" / "timeline.png"
LOW_SHARE, HIGH_SHARE = 0.35, 1.25  # of all models together, on top of what the server takes without any
_LINES_EVERY = 2.0  # seconds
console = Console(highlight=False, soft_wrap=True)


def tell(stack: contextlib.ExitStack, seconds: float, trained: Path | None) -> None:
    """Tell it.

    Args:
        stack: ends servers and removes temporary files when it is closed.
        seconds: of load in each phase.
        trained: a folder that keeps trained models; None: a temporary one.
    """
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="modelcache-demo-")))
    trained = trained or folder / "models"
    with _progress() as progress:
        sizes = _train(trained, progress)
        url, client = stack.enter_context(s3_store(folder))
        for model in progress.track(sizes, description="uploading to S3"):
            archive = f"{model}.tar.gz"
            client.put_object(Bucket=BUCKET, Key=archive, Body=(trained / archive).read_bytes())
    port = stack.enter_context(flask_server(folder, url))
    watch = Watch(stack.enter_context(Api(port)))
    watch.look()
    base, total = watch.samples[0].used, sum(sizes.values())
    tight, roomy = (base + int(share * total) for share in (LOW_SHARE, HIGH_SHARE))
    fleet = f"{len(sizes)} models, {min(sizes.values()) / MIB:.0f} to {max(sizes.values()) / MIB:.0f} MiB each"
    console.print(f"\n{fleet}, {total / MIB:.0f} MiB together. The server takes {base / MIB:.0f} MiB without any.")
    _set_high(watch, tight)
    with _progress() as progress:
        for model in progress.track(popularity(sizes)[0], description="each is asked for once: S3, disk, memory"):
            predict(watch.api, model, [0.0] * models.COLUMNS)
    with Load(port, list(sizes)) as load:
        began = time.monotonic()
        console.rule(f"[bold](a) threshold {tight / MIB:.0f} MiB: too low, about a third of the models fit")
        _watch_load(watch, load, seconds)
        _set_high(watch, roomy)
        raised = watch.samples[-1].at
        console.rule(f"[bold](b) threshold raised to {roomy / MIB:.0f} MiB on the running server")
        _watch_load(watch, load, seconds)
        ended = time.monotonic()
    if load.errors:
        console.print(f"[red]{len(load.errors)} requests failed, such as: {load.errors[0]}")
    before = phase("(a) threshold too low", began, raised, load.done, watch)
    after = phase("(b) raised on the running server", raised, ended, load.done, watch)
    table = Table("", before.name, after.name, title=f"{CLIENTS} clients, {seconds:.0f} s each")
    for row in rows((before, after)):
        table.add_row(*row)
    console.print("\n", table, sep="")
    console.print("(b) includes the seconds in which the models that had been evicted come back, each with one miss.")
    draw(PICTURE, before, after, watch, f"{fleet}; {CLIENTS} clients")
    console.print(f"Timeline: {PICTURE}")


def _progress() -> Progress:
    columns = (TextColumn("{task.description:<42}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console)


def _train(folder: Path, progress: Progress) -> dict[str, int]:
    """Train and pack the models; return their bytes, as loaded, by id."""
    task = progress.add_task("training scikit-learn models", total=len(models.recipes()))
    sizes = {}
    with contextlib.closing(models.train_all(folder)) as trained:
        for model, size in trained:
            sizes[model] = size
            progress.advance(task)
    return sizes


def _set_high(watch: Watch, high: int) -> None:
    watch.look()
    watch.api.call("PATCH", "/memory", {"high": high})
    watch.look()


def _watch_load(watch: Watch, load: Load, seconds: float) -> None:
    """Show, every other second, one model that came and those that went for it, with the figures that decided."""
    fresh: list[Event] = []
    began = shown = time.monotonic()
    with _progress() as progress:
        task = progress.add_task("", total=1.0)

        def show(events: list[Event], share: float) -> None:
            nonlocal shown
            fresh.extend(events)
            now, figures = watch.samples[-1], watch.samples[-10:][0]
            loads = (now.loads - figures.loads) / max(now.at - figures.at, 0.1)
            progress.update(
                task,
                completed=share,
                description=f"{len(load.done):>6,} answers, {loads:3.0f} loads/s, {now.used / MIB:.0f} MiB used",
            )
            if time.monotonic() - shown >= _LINES_EVERY:
                shown = time.monotonic()
                for line, style in _lines(fresh):
                    text = f"{shown - began:5.1f} s  {line}"
                    console.print(text, style=style, markup=False, soft_wrap=True)
                fresh.clear()

        watch.look_for(seconds, show)


def _lines(events: list[Event]) -> list[tuple[str, str]]:
    """Return one swap among ``events`` as lines with their colours: best one for which two models had to go."""
    found = swaps(events)
    if not found:
        return [("no model loaded, none evicted", "dim")]
    loaded, evicted = min(found, key=lambda swap: abs(len(swap[1]) - 2))
    more = f"  (and {len(found) - 1} more loads)" if len(found) > 1 else ""
    return [*((str(event), "red") for event in evicted), (f"{loaded}{more}", "green")]
