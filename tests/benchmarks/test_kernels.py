"""The kernels benchmark: what it counts in a compiled program, and what it needs."""

import importlib.metadata

import jax
import jax.numpy as jnp
import kernels
import pytest
from _kernels.count import Kernels, count

HLO = """\
HloModule step

%fused_add (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %sum = f32[8]{0} add(%p, %p)
}

%inner_body (q: (s32[], f32[8])) -> (s32[], f32[8]) {
  %q = (s32[], f32[8]{0}) parameter(0)
  %x = f32[8]{0} get-tuple-element(%q), index=1
  %y = f32[8]{0} fusion(%x), kind=kLoop, calls=%fused_add
  %z = f32[8]{0} copy(%y)
  ROOT %t = (s32[], f32[8]{0}) tuple(%x, %z)
}

%inner_condition (q.1: (s32[], f32[8])) -> pred[] {
  %q.1 = (s32[], f32[8]{0}) parameter(0)
  ROOT %less = pred[] fusion(%q.1), kind=kLoop, calls=%fused_add
}

%yes (r: f32[8]) -> f32[8] {
  %r = f32[8]{0} parameter(0)
  %w = (s32[], f32[8]{0}) while(%r), condition=%inner_condition, body=%inner_body
  ROOT %out = f32[8]{0} get-tuple-element(%w), index=1
}

%no (r.1: f32[8]) -> f32[8] {
  ROOT %r.1 = f32[8]{0} parameter(0)
}

ENTRY %main (a: f32[8], b: pred[]) -> f32[8] {
  %a = f32[8]{0} parameter(0), metadata={op_name="first"}
  %b = pred[] parameter(1)
  %c = (f32[8]{0}, f32[]) fusion(%a), kind=kInput, calls=%fused_add
  %d = f32[8]{0} get-tuple-element(%c), index=0
  %e = f32[8]{0} copy(%d)
  ROOT %f = f32[8]{0} conditional(%b, %e, %e), branch_computations={%yes, %no}
}
"""


def test_kernels_are_counted_where_they_are_launched():
    # Launched: fusion, copy, conditional. Inside: while, and its fusions and copy.
    assert count(HLO) == Kernels(3, 4, 1, 1)


def test_a_program_of_this_machine_can_be_counted():
    def step(x, flag):
        longer = lambda x: jax.lax.while_loop(lambda y: y[0] < 9, jnp.sin, x)
        return jax.lax.cond(flag, longer, lambda x: x, jnp.cumsum(x) * 2)

    program = jax.jit(step).lower(jnp.ones(8), jnp.array(True)).compile()
    found = count(program.as_text())
    assert found.conditions == 1
    assert found.launched >= 2 and found.inside >= 2
    plain = count(jax.jit(jnp.sin).lower(jnp.ones(8)).compile().as_text())
    assert (plain.inside, plain.conditions) == (0, 0)
    assert plain.launched >= 1


def test_a_machine_without_the_compiler_is_told_what_to_install():
    installed = {x.metadata["name"] for x in importlib.metadata.distributions()}
    if "jax-cuda13-plugin" in installed:
        pytest.skip("the compiler is installed")
    with pytest.raises(SystemExit, match=r"(?s)cannot compile.*pip install.*nvvm"):
        kernels.main(["--leaves", "1"])
