"""What a guard costs: one step, as a ratio to bare AdamW in the same run.

    command:   pip install -e ".[examples]" && python benchmarks/cost.py
    hardware:  any; ratios differ between machines, so compare within one table
    time:      25 minutes on two CPU cores, about three for each table
    expected:  `stabilize, apply` near 1.2, Optax's clip and apply_if_finite near 3

The optimizer alone at three sizes, in few leaves and in many, and a whole training step
of a transformer. Every step donates what it replaces, and is timed in turn with the
bare one, round by round. Peers are Optax's own functions, `clip_by_global_norm(1.0)`,
`adaptive_grad_clip(0.01)`, `apply_if_finite(..., 5)`, and, where PyTorch is installed,
its AdamW(foreach=True) alone and behind `clip_grad_norm_(1.0)`.
"""

import sys
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from _cost import pytorch, report
from _cost.measuring import Cost, Stepper, compare, compiled, in_turn, ratios
from _cost.problems import Problem, optimizer_alone, training_step
from _cost.steps import BARE, steps
from options import Parser, file, finish, number, whole

SIZES, LEAVES = [1e6, 2e7, 1e8], [8, 200]
# In a whole training step, of which the optimizer is a part.
IN_TRAINING = (
    "optax.clip_by_global_norm",
    "optax, clip + apply_if_finite",
    "clip_by_norm",
    "guard, update",
    "guard, apply",
    "stabilize, update",
    "stabilize, apply",
    "stabilize, trust region, apply",
)


def measure(
    problem: Problem, names: list[str], rounds: int, progress: Progress, torch: bool
) -> list[Cost]:
    """The rows of one table; a step that fails is told, and costs only its row."""
    chosen = {step.name: step for step in steps()}
    missing = [chosen[name] for name in names]
    task = progress.add_task(problem.name, total=len(missing) + 1)
    compiled(chosen[BARE], problem)  # What XLA starts once is not the bare step's.
    bare = Stepper(compiled(chosen[BARE], problem), problem.data)
    costs = [compare(chosen[BARE], bare, problem, rounds)]
    progress.advance(task)
    for step in missing:
        try:
            costs.append(compare(step, bare, problem, rounds))
        except (RuntimeError, MemoryError) as error:
            progress.console.print(f"{step.name}: {error}")
        progress.advance(task)
    if torch and pytorch.available():
        for name, step in pytorch.steppers(problem).items():
            found = ratios(in_turn([bare, step], rounds))
            costs.append(Cost(name, *found, 0, 0, 0, 0, 0, 0))
    return costs


def main(argv=None) -> int:
    """Prints the tables, and writes them where asked."""
    names = [step.name for step in steps() if step.name != BARE]
    parser = Parser(description=__doc__.splitlines()[0])
    size = number(float, lambda x: 64 <= x <= 1e12, "a number from 64 to 1e12")
    parser.add_argument("--sizes", type=size, nargs="*", default=SIZES, metavar="N")
    parser.add_argument("--leaves", type=whole(1), nargs="+", default=LEAVES)
    parser.add_argument("--rounds", type=whole(1), default=15, help="counted rounds")
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--width", type=whole(4), default=320, help="transformer's")
    parser.add_argument("--layers", type=whole(1), default=8, help="transformer's")
    parser.add_argument("--no-training", action="store_true", help="optimizer alone")
    parser.add_argument("--out", type=file, help="Markdown file to write")
    options = parser.parse_args(argv)
    if options.width % 4:
        parser.error("--width must be a multiple of 4, one for each head")
    console, parts = Console(width=max(Console().width, 128)), {}

    def show(problem: Problem, names: list[str], torch: bool) -> None:
        with Progress(console=console, transient=True) as progress:
            costs = measure(problem, names, options.rounds, progress, torch)
        parts[problem.name] = costs
        console.print(report.table(problem.name, costs))
        if options.out:  # As it goes: an interrupted run keeps what it has.
            options.out.write_text(report.markdown(parts, options.rounds))

    for count in options.sizes:
        for leaves in options.leaves:
            show(optimizer_alone(int(count), leaves), options.only, torch=True)
    if not options.no_training:
        chosen = [name for name in IN_TRAINING if name in options.only]
        show(training_step(options.layers, options.width), chosen, torch=False)
    console.print(report.LEGEND, report.machine(), sep="\n", highlight=False)
    return 0


if __name__ == "__main__":
    finish(main)
