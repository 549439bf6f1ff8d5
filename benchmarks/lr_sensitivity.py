"""How much training depends on the learning rate, by method.

    command:   pip install -e ".[examples]" && python benchmarks/lr_sensitivity.py
    hardware:  any; the tables come from the machine that they name
    time:      hours on two CPU cores for all rows and three seeds, taken up again where
               it was interrupted; `--quick --tasks B-adam --only NAME` a minute
    expected:  our trust region has the flattest curves, and loses nothing at good rates

Task A is a small character transformer, B a deep network without normalisation on
scikit-learn's digits; C, a small tanh network that fits a curve, trains well at most
rates, and shows what a method costs there. D, E and G are language models of growing
size, K a recurrent network that no method was tuned on. G needs a GPU and a folder of
text, `--data-dir`; without them its rows are not measured. Each method trains at every
rate of a log-spaced grid at once, from the same weights on the same batches; what is
stated is what it made of each rate. Results are kept in `--out`, and the tables show
every row with the seeds that are there: `--only NAME --fresh` computes one anew.
"""

import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import optax
from rich.console import Console
from rich.progress import Progress, TaskID

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import text
from _lr_sensitivity import figure, report, running
from _lr_sensitivity.language import gpt_task, recurrent_task, small_task, tuning_task
from _lr_sensitivity.methods import BARE, CLIP, Method, methods
from _lr_sensitivity.rows import Row, Table
from _lr_sensitivity.store import Store, place
from _lr_sensitivity.tasks import Task, curve_task, digits_task, text_task
from _lr_sensitivity.timing import Clock
from options import Parser, finish, folder, whole

from stablegrad.sweep._scores import score

HERE = Path(__file__).parent


class Entry(NamedTuple):
    """A task that can be asked for."""

    make: Callable[..., Task]  # steps -> task
    steps: int
    title: str
    rows: Callable[[Method], bool] = lambda method: True  # Those that it has.


def _ours(method: Method) -> bool:
    return method.ours or method.name == BARE


def _few(method: Method) -> bool:
    return method.name in (BARE, CLIP, "trust_region", "stabilize")


ENTRIES = {
    "A": Entry(text_task, 300, "A: transformer, AdamW"),
    "A-1000": Entry(text_task, 1000, "A: transformer, AdamW", rows=_ours),
    "B-adam": Entry(digits_task, 600, "B: ReLU network, Adam"),
    "B-momentum": Entry(
        partial(digits_task, "momentum"), 600, "B: ReLU network, momentum"
    ),
    "B-batch-8": Entry(
        partial(digits_task, batch_size=8), 600, "B: ReLU network, Adam, batch 8"
    ),
    "C-adam": Entry(curve_task, 3000, "C: tanh network, Adam", rows=_ours),
    "C-momentum": Entry(
        partial(curve_task, "momentum"), 3000, "C: tanh network, momentum", rows=_ours
    ),
    "D": Entry(small_task, 500, "D: transformer as GPT-2, AdamW", rows=_few),
    "E": Entry(
        tuning_task, 200, "E: the network of D tuned on another text", rows=_few
    ),
    "G": Entry(gpt_task, 500, "G: GPT of 10.6 million parameters, AdamW", rows=_few),
    "K": Entry(recurrent_task, 500, "K, kept: LSTM, RMSProp", rows=_few),
}


class Plan(NamedTuple):
    """What a run shall do."""

    keys: list[str]
    wanted: set[str]  # Methods to compute; the others are shown if they are there.
    seeds: range
    steps: int | None
    rounds: int  # Of step times; 0 for none.
    folder: Path
    fresh: bool
    data_dir: str | None  # The text of G.

    def task(self, key: str, steps: int | None = None) -> Task:
        """The task, at its own number of steps unless told otherwise."""
        entry = ENTRIES[key]
        steps = steps or self.steps or entry.steps
        if key == "G":
            return entry.make(self.data_dir, steps=steps)
        return entry.make(steps=steps)

    def measurable(self, key: str) -> bool:
        """Whether this machine can train it."""
        return key != "G" or (
            self.data_dir is not None and jax.default_backend() != "cpu"
        )


def row(
    plan: Plan, key: str, method: Method, clock: Clock, say: Callable[[str], None]
) -> tuple[Row, float] | None:
    """One row, and the loss before training; None if it is not there nor wanted."""
    wanted, task = method.name in plan.wanted, clock.task
    folder = place(plan.folder, f"{key}-{task.steps}-steps", method.name)
    if not (wanted or folder.exists()):
        return None

    def build(rate):
        return method.build(task, rate)

    say("reading")
    run = running.program(task, build, method.evaluated, method.extras)
    store = Store(folder, running.digest(run, task))
    about = {
        "task": key,
        "method": method.name,
        "steps": task.steps,
        "rates": task.rates,
        "backend": jax.default_backend(),
        "jax": jax.__version__,
        "optax": optax.__version__,
    }
    if wanted and plan.fresh:
        store.discard()
    curves = []
    for seed in plan.seeds:
        curve = store.curve(seed)
        if curve is None and wanted:
            say(f"seed {seed}")
            started = time.perf_counter()
            curve = running.measured(run, task, seed)
            seconds = round(time.perf_counter() - started, 2)
            store.keep_curve(seed, curve, {**about, "seed": seed, "seconds": seconds})
        if curve is not None:
            curves.append(curve)
    times = store.times()
    if times is None and wanted and plan.rounds:
        say("step time")
        times = clock.times(build(clock.rate), method.extras)
        store.keep_times(times, {**about, "rounds": plan.rounds})
    if not curves:
        return None
    scores = score(task.rates, task.trivial_loss, curves)
    start = float(curves[0].initial_loss[0])
    return Row(method.name, method.kind, scores, times, len(curves)), start


def table(
    plan: Plan, key: str, listed: list[Method], progress: Progress, bar: TaskID
) -> Table:
    """One task: a method that fails is reported, and does not stop the others."""
    entry, task = ENTRIES[key], plan.task(key)
    clock = Clock(task, plan.rounds)
    rows, failed, start = [], {}, float("nan")

    def say(what: str, of: str) -> None:
        progress.update(bar, description=f"{key}, {of}: {what}")

    for method in listed:
        try:
            found = row(plan, key, method, clock, partial(say, of=method.name))
        except Exception as error:  # The method's failure is a result.
            found = None
            if method.name in plan.wanted:
                why = f"{type(error).__name__}: {error}"
                failed[method.name] = " ".join(why.split())[:200]
                print(f"{key}, {method.name}: {failed[method.name]}", file=sys.stderr)
        if found is not None:
            rows.append(found[0])
            start = found[1]
        progress.advance(bar)
    title = f"{entry.title}, {task.steps} steps"
    return Table(title, task.rates, task.trivial_loss, start, rows, failed)


def applicable(plan: Plan, key: str) -> list[Method]:
    """The rows of a task."""
    task, wanted = plan.task(key, steps=1), ENTRIES[key].rows
    return [method for method in methods() if wanted(method) and method.applies(task)]


def tables(plan: Plan) -> dict[str, Table]:
    """All tasks."""
    rows = {key: applicable(plan, key) for key in plan.keys if plan.measurable(key)}
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("", total=sum(map(len, rows.values())))
        return {
            key: table(plan, key, listed, progress, bar) for key, listed in rows.items()
        }


def parsed(argv) -> tuple[Plan, bool]:
    """The plan, and whether the report beside this file is to be written."""
    names = [method.name for method in methods()]
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one seed")
    parser.add_argument("--seeds", type=whole(1), default=3, help="how many")
    parser.add_argument(
        "--tasks", nargs="+", metavar="TASK", choices=list(ENTRIES), default=None,
        help=f"some of {', '.join(ENTRIES)}",
    )  # fmt: skip
    parser.add_argument(
        "--only", nargs="+", metavar="METHOD", choices=names, default=names,
        help="compute these methods only; the others are shown where they are there",
    )  # fmt: skip
    parser.add_argument("--data-dir", help="folder of *.txt files for G")
    parser.add_argument("--steps", type=whole(1), help="in place of each task's own")
    parser.add_argument(
        "--rounds", type=whole(0), default=15, help="of step times, 0 for none"
    )
    parser.add_argument(
        "--out", type=folder, default="runs/lr_sensitivity", help="folder"
    )
    parser.add_argument(
        "--fresh", action="store_true", help="discard what is there of these methods"
    )
    parser.add_argument(
        "--report",
        action="store_true",
        help="write the report and figure beside this file, too",
    )
    options = parser.parse_args(argv)
    if options.data_dir is not None:
        try:
            text.load(options.data_dir)
        except ValueError as error:
            parser.error(str(error))
    for key in options.tasks or ():
        rows = [method.name for method in methods() if ENTRIES[key].rows(method)]
        if not set(rows) & set(options.only):
            parser.error(f"task {key} has the methods {', '.join(rows)}")
    plan = Plan(
        keys=[key for key in ENTRIES if key in (options.tasks or ENTRIES)],
        wanted=set(options.only),
        seeds=range(1 if options.quick else options.seeds),
        steps=options.steps,
        rounds=options.rounds,
        folder=options.out,
        fresh=options.fresh,
        data_dir=options.data_dir,
    )
    return plan, options.report


def main(argv=None) -> int:
    """Prints the report, and writes it."""
    plan, publish = parsed(argv)
    seen = tables(plan)
    about = (
        f"{len(plan.seeds)} seed{'s' * (len(plan.seeds) > 1)} at most, on "
        f"{jax.default_backend()}, jax {jax.__version__}, optax {optax.__version__}."
    )
    name = Path(__file__).stem
    left = [key for key in plan.keys if key not in seen]
    if left:
        about += f" Not measured here: {', '.join(left)} needs a GPU and --data-dir."
    written = report.whole(
        seen,
        methods(),
        about,
        figure=f"{name}.png",
        decided=plan.steps is None,  # The goals are for the tasks' own steps.
    )
    plan.folder.mkdir(parents=True, exist_ok=True)
    (plan.folder / f"{name}.md").write_text(written, encoding="utf-8")
    drawn = [data for data in seen.values() if data.rows]
    if drawn:
        figure.draw(drawn, plan.folder / f"{name}.png")
    if publish:
        for suffix in (".md", ".png") if drawn else (".md",):
            shutil.copy(plan.folder / f"{name}{suffix}", HERE / f"{name}{suffix}")
    print(written)
    return 0


if __name__ == "__main__":
    finish(main)
