"""Well-known training loops, adopted: how few lines change, and what that is worth.

Each file in `patterns` is a loop as its framework's own examples write it, on synthetic
data, without a guard. `CHANGES` are the lines that the documentation asks for. The bare
and the changed loop are trained on the same batches, without and with faults.
`python tests/adoption/test_adoption.py` prints what adoption takes.
"""

import difflib
import functools
import time
from pathlib import Path

import numpy as np
import pytest

import stablegrad as sg

PATTERNS = Path(__file__).parent / "patterns"
STEPS, HELD_OUT = 100, 100_000
FAULTS = {15: np.nan, 40: 1e20, 60: np.inf}  # Factors on one array of a batch.
MOST_LINES = 4  # Beside imports.
CLOSE = 0.05  # Of what training gains.

GUARD = "import stablegrad as sg\n"
TRAIN_STATE = f"{GUARD}from stablegrad.integrations.linen import apply_gradients\n"
CHANGES = {
    "mnist": {
        "from flax import nnx\n": f"from flax import nnx\n{GUARD}",
        "tx = optax.adamw(3e-3)": "tx = sg.stabilize(optax.adamw(3e-3))",
        "    grad_fn = nnx.value": "    old = jax.tree.map(lambda x: x, "
        "nnx.state(model, nnx.BatchStat))\n    grad_fn = nnx.value",
        "update(model, grads)\n": "update(model, grads, value=loss)\n    nnx.update("
        "model, sg.keep_if_skipped(optimizer.opt_state, old, "
        "nnx.state(model, nnx.BatchStat)))\n",
    },
    "imagenet": {
        "import optax\n": f"import optax\n{TRAIN_STATE}",
        "optax.sgd(rate, momentum=0.9, nesterov=True)": "sg.stabilize(optax.sgd(rate, "
        "momentum=0.9, nesterov=True))",
        'state.apply_gradients(grads=grads, batch_stats=new["batch_stats"])': (
            "apply_gradients(state, grads=grads, value=loss, fields=new)"
        ),
    },
    "seq2seq": {
        "import optax\n": f"import optax\n{TRAIN_STATE}",
        "optax.adam(1e-2)": "sg.stabilize(optax.adam(1e-2))",
        "state.apply_gradients(grads=grads)": "apply_gradients(state, grads=grads, "
        "value=loss)",
    },
    "gemma": {
        "import optax\n": f"import optax\n{TRAIN_STATE}",
        "tx = optax.adamw(1e-2, b1=0.9, b2=0.98, eps=1e-9)": "tx = sg.stabilize("
        "optax.adamw(1e-2, b1=0.9, b2=0.98, eps=1e-9))",
        "(_, _), grads": "(loss, _), grads",
        "state.apply_gradients(grads=grads)": "apply_gradients(state, grads=grads, "
        "value=loss)",
    },
    "equinox_loop": {
        "import optax\n": f"import optax\n{GUARD}",
        "optim = optax.adamw(1e-2)": "optim = sg.stabilize(optax.adamw(1e-2))",
        "optim.update(grads, opt_state, params)": "optim.update(grads, opt_state, "
        "params, value=loss)",
    },
    "haiku_style": {
        "import optax\n": f"import optax\n{GUARD}",
        "optimiser = optax.adam(5e-3)": "optimiser = sg.stabilize(optax.adam(5e-3))",
        "state.opt_state, state.params)": "state.opt_state, state.params, value=value)",
    },
}
every = pytest.mark.parametrize("name", CHANGES)


def bare_text(name):
    return (PATTERNS / f"{name}.py").read_text()


def guarded_text(name):
    text = bare_text(name)
    for old, new in CHANGES[name].items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def lines_to_adopt(name):
    """Lines of the changed loop that the bare one has not: imports, and others."""
    old, new = bare_text(name).splitlines(), guarded_text(name).splitlines()
    found = [x[2:] for x in difflib.ndiff(old, new) if x.startswith("+ ")]
    imports = [line for line in found if line.startswith(("import", "from"))]
    return len(imports), len(found) - len(imports)


@functools.cache
def loop(name, guarded):
    """The names of a loop, bare or changed, by running its text."""
    text = guarded_text(name) if guarded else bare_text(name)
    namespace = {"__name__": f"adopted_{name}"}
    exec(compile(text, f"{name}.py", "exec"), namespace)
    return namespace


@functools.cache
def trained(name, guarded, faulty):
    """Held-out loss, whether all is finite, and what holds the optimizer's state."""
    found = loop(name, guarded)
    batches = [found["batch_at"](step) for step in range(STEPS)]
    spoilt, factors = found["FAULTY"], FAULTS if faulty else {}
    with np.errstate(all="ignore"):
        for step, factor in factors.items():
            batches[step] = {**batches[step], spoilt: batches[step][spoilt] * factor}
    held_out = found["batch_at"](HELD_OUT, size=256)
    loss, leaves, state = found["train"](batches, held_out)
    return loss, all(np.isfinite(leaf).all() for leaf in leaves), state


def gain(name):
    found = loop(name, False)
    held_out = found["batch_at"](HELD_OUT, size=256)
    return found["initial_loss"](held_out) - trained(name, False, False)[0]


@every
def test_few_lines_change(name):
    imports, others = lines_to_adopt(name)
    assert 2 <= others <= MOST_LINES
    assert 1 <= imports <= 2


pytestmark = pytest.mark.devices(1)


@pytest.mark.slow
@every
def test_a_healthy_run_ends_as_the_bare_one(name):
    learned = gain(name)
    assert learned > 0.2  # The task can be learned at all.
    loss, finite, state = trained(name, True, False)
    assert finite
    assert loss - trained(name, False, False)[0] < CLOSE * learned
    assert sg.metrics(state)["skipped_steps"] == 0


@pytest.mark.slow
@every
def test_under_faults_the_bare_run_is_lost_and_the_adopted_one_is_not(name):
    assert not trained(name, False, True)[1]
    loss, finite, state = trained(name, True, True)
    assert finite
    assert loss - trained(name, False, False)[0] < CLOSE * gain(name)
    skipped = sg.metrics(state)["skipped_steps"]
    assert 2 <= skipped <= len(FAULTS)  # A softmax can bear a large finite factor.
    assert {event.step for event in sg.events(state)} <= set(FAULTS)


def report():
    """A table of what adoption takes, in lines and in CPU time of the process."""
    print("| loop | lines | imports | first step, s | bare | other steps, ms | bare |")
    print("|---|---|---|---|---|---|---|")
    for name in CHANGES:
        row = []
        for guarded in (True, False):
            found = loop(name, guarded)
            batches = [found["batch_at"](step) for step in range(STEPS)]
            held_out = found["batch_at"](HELD_OUT, size=256)
            seconds = {1: [], STEPS: []}
            for count in (1, STEPS) * 3:
                start = time.process_time()
                found["train"](batches[:count], held_out)
                seconds[count].append(time.process_time() - start)
            least = min(seconds[1])
            row.append(seconds[1][0] - least)
            row.append(1000 * (min(seconds[STEPS]) - least) / (STEPS - 1))
        imports, others = lines_to_adopt(name)
        first, later, bare_first, bare_later = row
        print(
            f"| {name} | {others} | {imports} | {first:.1f} | {bare_first:.1f} "
            f"| {later:.1f} | {bare_later:.1f} |"
        )


if __name__ == "__main__":
    report()
