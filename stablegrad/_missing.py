"""What a step lacks: errors and warnings that show how to pass it."""

from typing import Any

PASS_VALUE = """Pass it:
  optax: updates, state = tx.update(grads, state, params, value=loss)
  apply: params, state = sg.apply(tx, grads, state, params, value=loss)
  NNX:   optimizer.update(model, grads, value=loss)
  Linen: from stablegrad.integrations.linen import apply_gradients
         state = apply_gradients(state, grads=grads, value=loss)
         (`TrainState.apply_gradients` does not forward `value=`)"""


def missing_value(asker: str) -> ValueError:
    """Return the error for a step without `value=`, with the cure for each way."""
    return ValueError(
        f"{asker} judges the loss, but the step got no `value=`. {PASS_VALUE}"
    )


def unseen_value(extra: dict[str, Any]) -> str:
    """Return the warning for a step without `value=` where it is not required."""
    given = ", ".join(f"`{name}=`" for name in extra)
    instead = f"only {given}, which no threshold judges" if given else "nothing"
    return (
        "this guard can judge the loss, but the step got no `value=`: a loss that "
        "rises or is not finite goes unseen. By name it got "
        f"{instead}. {PASS_VALUE}\n"
        "`optax.MultiSteps(...).gradient_transformation()` and `optax.lookahead` drop "
        "it, `optax.MultiSteps` itself does not.\n"
        "Pass `value=None` to say that the loss is not to be judged."
    )


def misspelt_value_fn(name: str) -> str:
    """Return the warning for a keyword that resembles `value_fn`."""
    return (
        f"the step got `{name}=`, which this guard ignores, and no `value_fn=`, so no "
        "step is probed. Is `value_fn=` meant?"
    )


def missing_value_fn(asker: str, name: str) -> ValueError:
    """Return the error for a step without what a probe needs."""
    return ValueError(
        f"{asker} looks along the step, but the step got no `{name}=`. Pass the loss, "
        "and a function that repeats it on the same batch with the same random "
        "numbers:\n"
        "  optax: updates, state = tx.update(grads, state, params, value=loss,\n"
        "             value_fn=lambda p: loss_fn(p, batch))\n"
        "  apply: params, state = sg.apply(tx, grads, state, params, value=loss,\n"
        "             value_fn=lambda p: loss_fn(p, batch))\n"
        "  NNX:   before the loss is taken, which may change the model's state:\n"
        "         graphdef, _, rest = nnx.split(nnx.clone(model), nnx.Param, ...)\n"
        "         optimizer.update(model, grads, value=loss, value_fn=lambda p:\n"
        "             loss_fn(nnx.merge(graphdef, p, rest, copy=True), batch))\n"
        "  Linen: updates, opt_state = state.tx.update(\n"
        "             grads, state.opt_state, state.params, value=loss,\n"
        "             value_fn=lambda p: loss_fn(p, batch))"
    )


def not_a_loss(found: str) -> ValueError:
    """Return the error for a `value_fn` that does not give the loss."""
    return ValueError(
        "`value_fn` must be a function of the parameters that returns the loss alone, "
        f"but {found}. Pass value_fn=lambda p: loss_fn(p, batch); for a loss with "
        "`has_aux=True`: value_fn=lambda p: loss_fn(p, batch)[0]."
    )


def missing_params(asker: str) -> ValueError:
    """Return the error for a step without `params`, with the cure for each way."""
    return ValueError(
        f"{asker} needs the parameters, but the step got `params=None`. Pass them:\n"
        "  optax: updates, state = tx.update(grads, state, params)\n"
        "  apply: params, state = sg.apply(tx, grads, state, params)\n"
        "  NNX:   optimizer.update(model, grads)\n"
        "  Linen: state.apply_gradients(grads=grads)"
    )
