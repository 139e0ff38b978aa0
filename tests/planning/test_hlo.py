"""Reading compiled programs: what loops multiply, move and send."""

import jax
from jax import lax
import jax.numpy as jnp
import pytest

from dllm_jax.parallel import make_mesh
from dllm_jax.planning import hlo

ROUNDS, ROWS, WIDTH = 5, 64, 32


def compiled(fn, mesh, *shapes_and_specs):
  arguments = [
    jax.ShapeDtypeStruct(
      shape, jnp.float32, sharding=jax.NamedSharding(mesh, jax.P(*spec))
    )
    for shape, spec in shapes_and_specs
  ]
  with jax.set_mesh(mesh):
    return jax.jit(fn).lower(*arguments).compile().as_text()


@pytest.fixture(scope="module")
def work():
  """Work of a scan that gathers weights and scatters sums, on 4 x 2 devices."""
  mesh = make_mesh({"fsdp": 4, "tensor": 2})

  def local(x, weights):
    def layer(x, w):
      w = lax.all_gather(w, "fsdp", tiled=True)  # [32, 32]
      x = jnp.tanh(x @ w)
      total = lax.psum_scatter(x, "tensor", tiled=True)
      return jnp.concatenate([total, total]), None

    x = lax.scan(layer, x, weights)[0]
    return lax.psum(jnp.sum(x), ("fsdp", "tensor"))

  fn = jax.shard_map(
    local,
    in_specs=(jax.P(("fsdp", "tensor")), jax.P(None, "fsdp")),
    out_specs=jax.P(),
    check_vma=False,
  )
  text = compiled(
    fn,
    mesh,
    ((ROWS, WIDTH), (("fsdp", "tensor"),)),
    ((ROUNDS, WIDTH, WIDTH), (None, "fsdp")),
  )
  return hlo.read(text, devices=8)


def test_products_count_as_often_as_their_loop_runs(work):
  rows = ROWS // 8
  assert work.flops == ROUNDS * 2 * rows * WIDTH * WIDTH


def test_collectives_count_as_often_as_their_loop_runs(work):
  one = {c.kind: c for c in work.collectives}
  gathered, scattered = one["all-gather"], one["reduce-scatter"]
  assert (gathered.size, gathered.times) == (4 * WIDTH * WIDTH, ROUNDS)
  assert gathered.sent == ROUNDS * 4 * WIDTH * WIDTH * 3 / 4
  assert (scattered.size, scattered.times) == (4 * ROWS // 8 * WIDTH, ROUNDS)
  assert scattered.sent == ROUNDS * 4 * ROWS // 8 * WIDTH / 2
  assert one["all-reduce"].sent == 2 * 4 * 7 / 8


def test_groups_are_those_of_the_mesh(work):
  groups = {c.kind: c.group for c in work.collectives}
  assert groups["all-gather"] == (0, 2, 4, 6)
  assert groups["reduce-scatter"] == (0, 1)
  assert sorted(groups["all-reduce"]) == list(range(8))


def test_a_slice_of_stacked_weights_moves_a_slice(work):
  # Were each round to read the whole stack, this would be five times more.
  stack = 4 * ROUNDS * WIDTH * WIDTH / 4
  assert stack < work.moved < ROUNDS * 14 * 4 * WIDTH * WIDTH


def test_loops_of_unknown_length_need_a_number():
  mesh = make_mesh({"data": 8})

  def fn(x, w):
    n = jnp.sum(x > 0)
    return lax.fori_loop(0, n, lambda i, x: jnp.tanh(x @ w), x)

  text = compiled(fn, mesh, ((8, 64), ("data",)), ((64, 64), ()))
  with pytest.raises(ValueError, match="rounds is not known"):
    hlo.read(text, devices=8)
  assert hlo.read(text, devices=8, rounds=(7,)).flops == 7 * 2 * 64 * 64


def test_a_loop_that_ends_itself_is_a_condition():
  mesh = make_mesh({"data": 8})

  def fn(x, w):
    once = lambda carry: (jnp.array(False), jnp.tanh(carry[1] @ w))
    return lax.while_loop(lambda carry: carry[0], once, (jnp.sum(x) > 0, x))

  text = compiled(fn, mesh, ((8, 64), ("data",)), ((64, 64), ()))
  assert hlo.read(text, devices=8).flops == 2 * 64 * 64
  # It lies in no loop, so that the innermost rounds are others'.
  assert hlo.innermost(text, rounds=(9,)).moved == 0


@pytest.mark.parametrize(
  "groups, first",
  [
    ("{{0,3},{1,2}}", (0, 3)),
    ("[2,4]<=[8]", (0, 1, 2, 3)),
    ("[2,4]<=[4,2]T(1,0)", (0, 2, 4, 6)),
    ("mesh['a'=4,'b'=2] {'a'}", (0, 2, 4, 6)),
    ("mesh['a'=2,'b'=4] {'b':(2)2}", (0, 1)),
    ("mesh['a'=2,'b'=4] {'b':(1)2}", (0, 2)),
    ("{}", tuple(range(8))),
  ],
)
def test_forms_of_replica_groups(groups, first):
  text = f"""
HloModule m

ENTRY %main (p: f32[16]) -> f32[16] {{
  %p = f32[16]{{0}} parameter(0)
  ROOT %r = f32[16]{{0}} all-reduce(%p), replica_groups={groups}, to_apply=%s
}}
"""
  (one,) = hlo.read(text, devices=8).collectives
  assert one.group == first
  assert one.size == 64


def test_loops_of_tpus_tell_their_length_by_their_condition():
  text = """
HloModule m

%body (p: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %p = (s32[], f32[8,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8,8]{1,0} get-tuple-element(%p), index=1
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  %y = f32[8,8]{1,0} convolution(%x, %x), dim_labels=bf_io->bf, frontend_attributes={text="{
}}, metadata={op_name="dot"}
  ROOT %t = (s32[], f32[8,8]{1,0}) tuple(%next, %y)
}, execution_thread="sparsecore"

%test (p: (s32[], f32[8,8])) -> pred[] {
  %p = (s32[], f32[8,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] constant(10)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (x: f32[8,8]) -> f32[8,8] {
  %x = f32[8,8]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], f32[8,8]{1,0}) tuple(%zero, %x)
  %w = (s32[], f32[8,8]{1,0}) while(%start), condition=%test, body=%body
  ROOT %out = f32[8,8]{1,0} get-tuple-element(%w), index=1
}
"""
  assert hlo.read(text, devices=1).flops == 5 * 2 * 8**3


def test_padding_and_holes_of_a_window_do_not_count():
  # A batched product, as TPUs write it: of the window's 4 places one is real.
  text = """
HloModule m

ENTRY %main (a: f32[16,1,32], b: f32[32,4,8]) -> f32[16,4,8] {
  %a = f32[16,1,32]{2,1,0} parameter(0)
  %b = f32[32,4,8]{2,1,0} parameter(1)
  ROOT %c = f32[16,4,8]{2,1,0} convolution(%a, %b), window={size=4 pad=3_3 rhs_reversal=1}, dim_labels=b0f_i0o->b0f
}
"""
  assert hlo.read(text, devices=1).flops == 2 * 16 * 32 * 8 * 4


@pytest.mark.parametrize("body, passes", [
    ("%b = f32[] parameter(1)\n  ROOT %s = f32[] add(%a, %b)", 3),
    ("ROOT %b = f32[] parameter(1)", 2),
], ids=["added", "replaced"])  # fmt: skip
def test_what_is_scattered_in_place_moves_as_much_as_it_changes(body, passes):
  """What is added to is read first, what is written over is not."""
  text = """
HloModule m

%change (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  BOTH
}

%add (total: f32[64,8], at: s32[2,1], more: f32[2,1,8]) -> f32[64,8] {
  %total = f32[64,8]{1,0} parameter(0)
  %at = s32[2,1]{1,0} parameter(1)
  %more = f32[2,1,8]{2,1,0} parameter(2)
  ROOT %s = f32[64,8]{1,0} scatter(%total, %at, %more), to_apply=%change
}

ENTRY %main (x: f32[64,8], i: s32[2,1], y: f32[2,1,8]) -> f32[64,8] {
  %x = f32[64,8]{1,0} parameter(0)
  %i = s32[2,1]{1,0} parameter(1)
  %y = f32[2,1,8]{2,1,0} parameter(2)
  ROOT %f = f32[64,8]{1,0} fusion(%x, %i, %y), kind=kInput, calls=%add
}
"""
  changed, places = 4 * 2 * 8, 4 * 2
  work = hlo.read(text.replace("BOTH", body), devices=1)
  assert work.moved == passes * changed + places


def test_kernels_of_attention_tell_their_products_by_their_shapes():
  text = """
HloModule m

ENTRY %main (q: bf16[2,64,8,16], k: bf16[2,96,4,16]) -> bf16[2,64,8,16] {
  %q = bf16[2,64,8,16]{3,2,1,0} parameter(0)
  %k = bf16[2,96,4,16]{3,2,1,0} parameter(1)
  ROOT %o = bf16[2,64,8,16]{3,2,1,0} custom-call(%q, %k, %k), custom_call_target="__cudnn$fmhaSoftmax"
}
"""
  (kernel,) = hlo.read(text, devices=1).kernels
  assert kernel.product == 2 * 2 * 64 * 8 * 16 * 96 and kernel.times == 1


def test_one_call_of_a_loop_in_a_loop_and_what_it_writes_whole():
  """A fusion in a fusion reads a slice of a stack; a copy writes all of it."""
  text = """
HloModule m

%slice (s: f32[5,8,8], i: s32[]) -> f32[8,8] {
  %s = f32[5,8,8]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %one = f32[1,8,8]{2,1,0} dynamic-slice(%s, %i, %i, %i), dynamic_slice_sizes={1,8,8}
  ROOT %b = f32[8,8]{1,0} bitcast(%one)
}

%product (w: f32[5,8,8], j: s32[], x: f32[8,8]) -> f32[8,8] {
  %w = f32[5,8,8]{2,1,0} parameter(0)
  %j = s32[] parameter(1)
  %x = f32[8,8]{1,0} parameter(2)
  %f = f32[8,8]{1,0} fusion(%w, %j), kind=kLoop, calls=%slice
  ROOT %c = f32[8,8]{1,0} convolution(%x, %f), dim_labels=bf_io->bf
}

%inner (p: (s32[], f32[5,8,8], f32[8,8])) -> (s32[], f32[5,8,8], f32[8,8]) {
  %p = (s32[], f32[5,8,8]{2,1,0}, f32[8,8]{1,0}) parameter(0)
  %k = s32[] get-tuple-element(%p), index=0
  %all = f32[5,8,8]{2,1,0} get-tuple-element(%p), index=1
  %y = f32[8,8]{1,0} get-tuple-element(%p), index=2
  %same = f32[5,8,8]{2,1,0} copy(%all)
  %next = f32[8,8]{1,0} fusion(%same, %k, %y), kind=kOutput, calls=%product
  %near = (f32[8,8]{1,0:S(1)}, f32[8,8]{1,0}, u32[]) copy-start(%next)
  ROOT %t = (s32[], f32[5,8,8]{2,1,0}, f32[8,8]{1,0}) tuple(%k, %same, %next)
}

%some (p: (s32[], f32[5,8,8], f32[8,8])) -> pred[] {
  %p = (s32[], f32[5,8,8]{2,1,0}, f32[8,8]{1,0}) parameter(0)
  ROOT %yes = pred[] constant(true)
}

%outer (p: (s32[], f32[5,8,8], f32[8,8])) -> (s32[], f32[5,8,8], f32[8,8]) {
  %p = (s32[], f32[5,8,8]{2,1,0}, f32[8,8]{1,0}) parameter(0)
  ROOT %w = (s32[], f32[5,8,8]{2,1,0}, f32[8,8]{1,0}) while(%p), condition=%some, body=%inner
}

ENTRY %main (p: (s32[], f32[5,8,8], f32[8,8])) -> (s32[], f32[5,8,8], f32[8,8]) {
  %p = (s32[], f32[5,8,8]{2,1,0}, f32[8,8]{1,0}) parameter(0)
  ROOT %w = (s32[], f32[5,8,8]{2,1,0}, f32[8,8]{1,0}) while(%p), condition=%some, body=%outer
}
"""
  found = hlo.innermost(text, rounds=(3, 7))
  stack, one, number = 4 * 5 * 64, 4 * 64, 4
  # The copy, the product (its slice, x, what it makes), what goes to the chip.
  assert found.moved == pytest.approx(2 * stack + (3 * one + number) + one)
  assert found.whole(stack) == 1


def test_what_is_larger_than_an_array_is_no_copy_of_it():
  written = ((3.0, 7.0), (4.0, 1.0), (8.0, 2.0), (9.0, 5.0))
  assert hlo.Round(moved=0.0, written=written).whole(4.0) == 3.0
