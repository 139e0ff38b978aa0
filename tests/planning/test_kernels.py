"""What a plan reads of kernels: their names, products and tiles."""

import pytest

from dllm_jax.planning import hlo

# Shapes as the compiler for H200 has them; operations around are left out.
FLASH = """
HloModule m, is_scheduled=true

ENTRY %main (f: s32[1], e: s32[2,4,2], n: s32[2,4,8], s: s32[2,512], q: bf16[2,512,4,64], k: bf16[2,512,2,64]) -> bf16[2,512,4,64] {
  %f = s32[1]{0} parameter(0)
  %e = s32[2,4,2]{2,1,0} parameter(1)
  %n = s32[2,4,8]{2,1,0} parameter(2)
  %s = s32[2,512]{1,0} parameter(3)
  %q = bf16[2,512,4,64]{3,2,1,0} parameter(4)
  %k = bf16[2,512,2,64]{3,2,1,0} parameter(5)
  ROOT %call = bf16[2,512,4,64]{3,2,1,0} custom-call(%f, %e, %n, %s, %s, /*index=5*/%q, %k, %k), custom_call_target="__gpu$xla.gpu.triton", metadata={op_name="jit(step)/jvp()/shard_map/KERNEL/pallas_call" stack_frame_id=10}
}
"""
GROUPED = """
HloModule m, is_scheduled=true

ENTRY %main (i: s32[9], x: bf16[64,16], w: bf16[4,16,32]) -> SHAPE {
  %i = s32[9]{0} parameter(0)
  %x = bf16[64,16]{1,0} parameter(1)
  %w = OPERAND parameter(2)
  ROOT %call = SHAPE custom-call(ORDER), custom_call_target="TARGET", metadata={op_name="jit(step)/tokamax:{\\"op\\":\\"ops.ragged_dot\\"}/pallas_call"}
}
"""


@pytest.mark.parametrize("name", ["flash_forward", "flash_backward_dq"])
def test_kernels_of_tiles_count_all_places_of_their_operands(name):
  work = hlo.read(FLASH.replace("KERNEL", name), devices=1)
  (kernel,) = work.kernels
  assert kernel.name == name
  assert kernel.product == 2 * 2 * 512 * 512 * 4 * 64
  assert work.flops == 0


def test_the_kernel_of_caches_counts_one_layer_of_them():
  cache = "[3,2,2,1024,64]"
  text = FLASH.replace("KERNEL", "flash_kept")
  text = text.replace("[2,512,2,64]{3,2,1,0}", cache + "{4,3,2,1,0}")
  work = hlo.read(text.replace("[2,512,2,64]", cache), devices=1)
  (kernel,) = work.kernels
  assert kernel.product == 2 * 2 * 512 * 1024 * 4 * 64
  small = 4 * (1 + 16 + 64 + 2 * 1024)
  queries, layer = 2 * 2 * 512 * 4 * 64, 2 * 2 * 2 * 1024 * 64
  assert work.moved == small + 2 * queries + 2 * layer


def test_keys_beside_a_cache_are_more_slots():
  one, cache = "bf16[2,512,2,64]{3,2,1,0}", "[3,2,2,1024,64]"
  text = FLASH.replace("KERNEL", "flash_kept")
  text = text.replace(one, f"bf16{cache}{{4,3,2,1,0}}")
  text = text.replace("k: bf16[2,512,2,64])", f"k: bf16{cache}, o: {one[:17]})")
  text = text.replace("%k, %k)", "%k, %k, %s, %o, %o)")
  text = text.replace("  ROOT", f"  %o = {one} parameter(6)\n  ROOT")
  (kernel,) = hlo.read(text, devices=1).kernels
  assert kernel.product == 2 * 2 * 512 * (1024 + 512) * 4 * 64


GATHERED = """
HloModule m, is_scheduled=true

%rows (x: f32[64,512], i: s32[4,1]) -> f32[4,512] {
  %x = f32[64,512]{1,0} parameter(0)
  %i = s32[4,1]{1,0} parameter(1)
  %e = f32[64,512]{1,0} exponential(%x)
  %g = f32[4,512]{1,0} gather(%e, %i), offset_dims={1}, collapsed_slice_dims={0}, start_index_map={0}, index_vector_dim=1, slice_sizes={1,512}
  ROOT %n = f32[4,512]{1,0} USE
}

ENTRY %main (x: f32[64,512], i: s32[4,1]) -> f32[4,512] {
  %x = f32[64,512]{1,0} parameter(0)
  %i = s32[4,1]{1,0} parameter(1)
  ROOT %f = f32[4,512]{1,0} fusion(%x, %i), kind=kLoop, calls=%rows
}
"""


def test_what_is_gathered_of_a_fusions_own_is_all_that_it_reads():
  moved = lambda use: hlo.read(GATHERED.replace("USE", use), devices=1).moved
  rows = 4 * 4 * 512
  assert moved("negate(%g)") == 2 * rows + 4 * 4
  padded = """%z = f32[64,512]{1,0} iota(), iota_dimension=0
  %s = f32[64,512]{1,0} select(%z, %z, %x)
  %e = f32[65,512]{1,0} pad(%s, %z), padding=0_1x0_0"""
  text = GATHERED.replace("%e = f32[64,512]{1,0} exponential(%x)", padded)
  text = text.replace("USE", "negate(%g)")
  assert hlo.read(text, devices=1).moved == 2 * rows + 4 * 4
  whole = "reduce-window(%e)"  # anything else wants all of it
  assert moved(whole) == 4 * 64 * 512 + rows + 4 * 4


@pytest.mark.parametrize("target", ["mosaic_gpu_v2", "__gpu$xla.gpu.triton"])
@pytest.mark.parametrize(
  "order, operand, shape",
  [
    ("%i, %x, %w", "bf16[4,16,32]{2,1,0}", "bf16[64,32]{1,0}"),
    ("%i, %x, %w", "bf16[64,32]{1,0}", "bf16[4,16,32]{2,1,0}"),
  ],
)
def test_products_of_groups_count_each_row_once(target, order, operand, shape):
  text = GROUPED.replace("ORDER", order).replace("OPERAND", operand)
  text = text.replace("SHAPE", shape).replace("TARGET", target)
  (kernel,) = hlo.read(text, devices=1).kernels
  assert (kernel.name, kernel.product) == ("ragged", 2 * 64 * 16 * 32)


BRANCHES = """
HloModule m, is_scheduled=true

%one (a: bf16[2,64,8,16]) -> bf16[2,64,8,16] {
  %a = bf16[2,64,8,16]{3,2,1,0} parameter(0)
  ROOT %o = bf16[2,64,8,16]{3,2,1,0} custom-call(%a, %a, %a), custom_call_target="__cudnn$fmhaSoftmax"
}

%several (b: bf16[2,64,8,16]) -> bf16[2,64,8,16] {
  %b = bf16[2,64,8,16]{3,2,1,0} parameter(0)
  %c = bf16[2,64,8,16]{3,2,1,0} copy(%b)
  ROOT %o = bf16[2,64,8,16]{3,2,1,0} custom-call(%b, %b, %b, %b, %b, %b, %c, %c), custom_call_target="__gpu$xla.gpu.triton", metadata={op_name="jit(f)/flash_forward/pallas_call"}
}

%nothing (d: bf16[2,64,8,16]) -> bf16[2,64,8,16] {
  ROOT %d = bf16[2,64,8,16]{3,2,1,0} parameter(0)
}

ENTRY %main (p: s32[], x: bf16[2,64,8,16]) -> bf16[2,64,8,16] {
  %p = s32[] parameter(0)
  %x = bf16[2,64,8,16]{3,2,1,0} parameter(1)
  ROOT %r = bf16[2,64,8,16]{3,2,1,0} conditional(%p, %x, %x), branch_computations={%FIRST, %several}
}
"""


def test_of_two_ways_to_attend_the_one_for_rows_of_one_text_counts():
  kernels = lambda first: [
    kernel.name
    for kernel in hlo.read(BRANCHES.replace("FIRST", first), devices=1).kernels
  ]
  assert kernels("one") == ["__cudnn$fmhaSoftmax"]
  assert kernels("nothing") == ["flash_forward"]
