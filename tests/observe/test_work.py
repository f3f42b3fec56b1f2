"""FLOPs, traffic and collectives of compiled programs, against hand counts; texts of compilers without their device."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from shnet_jax.observe import work as program
from shnet_jax.parallel.axis import all_gather, psum, ring_shift, sum_scatter
from shnet_jax.parallel.mapping import data_mesh, map_specs
from shnet_jax.types import DATA, WARM_UP

FLOAT = 4


def work_on(fn, *shapes, specs, out, devices=8):
    """Work of the per-device `fn` on float32 of these global shapes."""
    mapped = map_specs(fn, data_mesh(jax.devices()[:devices]), specs, out)
    given = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return program.work(mapped.lower(*given).compile().as_text())


def compiled(fn, *shapes):
    """`fn` for float32 of these shapes."""
    return jax.jit(fn).lower(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).compile()


def alone(fn, *shapes):
    """Work of `fn` on one device, and XLA's own count."""
    done = compiled(fn, *shapes)
    return program.work(done.as_text()), done.cost_analysis()


def test_sum_over_devices():
    actual = work_on(lambda x: psum(x, DATA), (8, 96), specs=P(DATA), out=P())
    assert actual.collectives == {"all-reduce": 96 * FLOAT}


def test_gather_and_scatter():
    actual = work_on(lambda x: all_gather(x, DATA), (16, 32), specs=P(DATA), out=P())
    assert actual.collectives == {"all-gather": 16 * 32 * FLOAT}
    actual = work_on(lambda x: sum_scatter(x, DATA), (16, 32), specs=P(), out=P(DATA))
    assert actual.collectives == {"reduce-scatter": 16 * 32 * FLOAT}
    actual = work_on(lambda x: lax.all_to_all(x, DATA, 1, 0, tiled=True), (16, 32), specs=P(DATA), out=P(DATA))
    assert actual.collectives == {"all-to-all": 2 * 32 * FLOAT}


def test_ring_in_a_loop_of_known_length():
    def around(x):
        return lax.scan(lambda c, _: (ring_shift(jnp.sin(c), DATA), None), x, None, length=5)[0]

    actual = work_on(around, (16, 32), specs=P(DATA), out=P(DATA))
    assert actual.collectives == {"collective-permute": 5 * 2 * 32 * FLOAT}
    assert actual.loops_once == 0


def test_loops_multiply_and_nest():
    def fn(x, w):
        def inner(c, _):
            return jnp.sin(c @ w), None

        return lax.scan(lambda c, _: (lax.scan(inner, c, None, length=3)[0], None), x, None, length=7)[0]

    actual, xla = alone(fn, (16, 32), (32, 32))
    assert actual.flops == 3 * 7 * 2 * 16 * 32 * 32
    assert xla["flops"] < actual.flops / 3  # why there is a count of our own
    assert actual.loops_once == 0


def test_a_loop_of_unknown_length_counts_once():
    def fn(x, w):
        return lax.while_loop(lambda c: jnp.sum(c) < 1e6, lambda c: jnp.sin(c @ w), x)

    actual, _ = alone(fn, (16, 32), (32, 32))
    assert actual.flops == 2 * 16 * 32 * 32 and actual.loops_once == 1


def test_product_and_its_traffic():
    actual, xla = alone(jnp.matmul, (64, 48), (48, 32))
    assert actual.flops == xla["flops"] == 2 * 64 * 48 * 32
    assert actual.bytes == xla["bytes accessed"] == FLOAT * (64 * 48 + 48 * 32 + 64 * 32)


def scanned(x, w, length=7, unroll=1):
    return lax.scan(lambda c, _: (jnp.sin(c @ w), None), x, None, length=length, unroll=unroll)[0]


def convolution(**options):
    fixed = {"window_strides": (1, 1), "padding": "VALID", "dimension_numbers": ("NHWC", "HWIO", "NHWC")}
    return lambda x, w: lax.conv_general_dilated(x, w, **fixed | options)


def gradients(fn):
    return jax.grad(lambda *arguments: jnp.sin(fn(*arguments)).sum(), (0, 1))


PRODUCT = 16 * 32 * 32
VECTORS = (16, 32), (32, 32)
IMAGES = (2, 20, 30, 4), (3, 3, 4, 6)


@pytest.mark.parametrize(
    "fn, shapes, multiplications",
    [
        (functools.partial(jnp.einsum, "bik,bkj->bij"), ((4, 16, 8), (4, 8, 24)), 4 * 16 * 8 * 24),
        (functools.partial(scanned, unroll=3), VECTORS, 7 * PRODUCT),
        (lambda x, w: lax.map(lambda row: jnp.sin(row @ w), x, batch_size=5), ((17, 32), (32, 8)), 17 * 32 * 8),
        (gradients(scanned), VECTORS, 3 * 7 * PRODUCT),
        # In the backward pass of each trip both products once more, and two gradients of both.
        (gradients(lambda x, w: lax.scan(jax.checkpoint(lambda c, _: (scanned(c, w, 2, 2), None)), x, None, 5)[0]),
         VECTORS, (2 + 2 + 4) * 5 * PRODUCT),
        (convolution(), IMAGES, 2 * 18 * 28 * 9 * 4 * 6),
        (convolution(window_strides=(2, 3)), IMAGES, 2 * 9 * 10 * 9 * 4 * 6),
        (convolution(rhs_dilation=(2, 2)), IMAGES, 2 * 16 * 26 * 9 * 4 * 6),
        (convolution(feature_group_count=2), ((2, 20, 30, 4), (3, 3, 2, 6)), 2 * 18 * 28 * 9 * 2 * 6),
        (gradients(convolution(window_strides=(2, 3))), IMAGES, 3 * 2 * 9 * 10 * 9 * 4 * 6),
        (gradients(convolution(feature_group_count=2)), ((2, 20, 30, 4), (3, 3, 2, 6)), 3 * 2 * 18 * 28 * 9 * 2 * 6),
    ],
    ids=["batched", "unrolled", "remainder", "loop-gradient", "remat", "convolution", "strided", "dilated", "grouped",
         "strided-gradient", "grouped-gradient"],
)  # fmt: skip
def test_operations_by_hand(fn, shapes, multiplications):
    counted, _ = alone(fn, *shapes)
    assert counted.flops == 2 * multiplications and counted.loops_once == 0


def warming(step, x, w):
    """A branch of two products for the first steps, of one for all others."""
    with jax.named_scope(WARM_UP):
        return lax.cond(step[0] < 5, lambda: jnp.sin(x @ w @ w).sum(), lambda: jnp.sin(x @ w).sum())


@pytest.mark.parametrize("turns", [1, 3])
def test_the_branch_of_the_steps_after_the_warm_up_counts(turns):
    """In the forward pass and in the gradient, in a loop or not."""

    def fn(step, x, w):
        def value(x, w):
            return lax.scan(lambda c, _: (c + warming(step, x + c, w), None), 0.0, None, length=turns)[0]

        return jax.grad(value, (0, 1))(x, w)

    text = compiled(fn, (1,), (16, 32), (32, 32)).as_text()
    product = 2 * 16 * 32 * 32
    assert [work.flops for work in program.steady_and_warm_up(text)] == [3 * turns * product, 6 * turns * product]


def test_a_branch_inside_of_the_warm_up_is_one_like_others():
    def fn(step, x, w):
        def warm():
            return lax.cond(x[0, 0] > 0, lambda: jnp.sin(x @ w @ w), lambda: x @ w)

        with jax.named_scope(WARM_UP):
            return lax.cond(step[0] < 5, warm, lambda: jnp.sin(x))

    text = compiled(fn, (1,), (16, 32), (32, 32)).as_text()
    assert [work.flops for work in program.steady_and_warm_up(text)] == [0, 2 * 2 * 16 * 32 * 32]


def test_the_most_expensive_branch_counts():
    def fn(i, x, w):
        return lax.cond(i[0] > 0, lambda: jnp.sin(x @ w @ w), lambda: x @ w)

    actual, _ = alone(fn, (1,), (16, 32), (32, 32))
    assert actual.flops == 2 * 2 * 16 * 32 * 32


def test_a_slice_of_a_large_array_is_read_alone():
    def fn(x):
        return lax.scan(lambda c, row: (c + jnp.sin(row), None), x[0], x)[0]

    actual, _ = alone(fn, (1000, 2048))
    once = 1000 * 2048 * FLOAT
    assert once < actual.bytes < 6 * once  # not 1000 times


# As libtpu writes it: no shapes of operands, memory spaces, no number of turns, products as convolutions.
TPU = """HloModule jit_f, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %c = f32[]{:T(128)} add(%a, %b)
}

%fused (p0: f32[1024,512], p1: f32[512,512]) -> f32[1024,512] {
  %p0 = <X> parameter(0)
  %p1 = <W> parameter(1)
  ROOT %conv = f32[1024,512]{1,0} convolution(%p0, %p1), dim_labels=bf_io->bf, operand_precision={highest,highest}
}

%body (s: (s32[], f32[1024,512], f32[512,512], s32[], /*index=4*/s32[])) -> (s32[], f32[1024,512]) {
  %s = <STATE> parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%s), index=0
  %copy.1 = s32[]{:T(128)S(6)} copy(%i)
  %one = s32[] get-tuple-element(%s), index=3
  %limit = s32[] get-tuple-element(%s), index=4
  %next = s32[]{:T(128)} add(%copy.1, %one)
  %x = <X> get-tuple-element(%s), index=1
  %w = <W> get-tuple-element(%s), index=2
  %y = <X> fusion(%x, %w), kind=kOutput, calls=%fused, metadata={op_name="a(b)"}
  %start = (<X>, <X>, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%y), channel_id=1
  %moved = <X> collective-permute-done(%start)
  ROOT %t = <STATE> tuple(%next, %moved, %w, %one, %limit)
}

%test (s: (s32[], f32[1024,512], f32[512,512], s32[], /*index=4*/s32[])) -> pred[] {
  %s.1 = <STATE> parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%s.1), index=0
  %limit.1 = s32[] get-tuple-element(%s.1), index=4
  ROOT %lt = pred[]{:T(512)} compare(%i.1, %limit.1), direction=LT
}

ENTRY %main (x: f32[1024,512], w: f32[64,512], q: bf16[64,16,512]) -> f32[512] {
  %x.2 = <X> parameter(0)
  %w.2 = f32[64,512]{1,0:T(8,128)} parameter(1)
  %q.2 = bf16[64,16,512]{2,1,0:T(8,128)S(1)} parameter(2)
  %zero = s32[] constant(0)
  %one.2 = s32[] constant(2)
  %seven = s32[] constant(7)
  %gather = (f32[64,512]{1,0:T(8,128)}, <W>) all-gather-start(%w.2), channel_id=2, dimensions={0}
  %whole = <W> all-gather-done(%gather)
  %copy.2 = s32[] copy(%zero)
  %t.2 = <STATE> tuple(%copy.2, %x.2, %whole, %one.2, %seven)
  %loop = <STATE> while(%t.2), condition=%test, body=%body
  %batched = f32[64,16,16]{2,1,0:S(1)} convolution(%q.2, %q.2), <WINDOW>, dim_labels=0bf_0oi->0bf
  %sums = (f32[512]{0:T(512)S(1)}, f32[7,512]{1,0:T(8,128)S(1)}) all-reduce(%a.0, %b.0), channel_id=3, to_apply=%add
  %a.0 = f32[512]{0:T(512)S(1)} constant({...})
  %b.0 = f32[7,512]{1,0:T(8,128)S(1)} constant({...})
  ROOT %out = f32[512]{0:T(512)S(1)} get-tuple-element(%sums), index=0
}
"""
TPU = TPU.replace("<WINDOW>", "window={size=64 stride=63 lhs_dilate=64}")
TPU = TPU.replace("<STATE>", "(s32[], <X>, <W>, s32[], /*index=4*/s32[])")
TPU = TPU.replace("<X>", "f32[1024,512]{1,0:T(8,128)S(1)}").replace("<W>", "f32[512,512]{1,0:T(8,128)}")


def test_text_of_the_tpu_compiler():
    actual = program.work(TPU)
    turns = 4  # from 0 by 2 while below 7
    product, batched = 2 * 1024 * 512 * 512, 2 * 64 * 16 * 16 * 512
    assert actual.flops == turns * product + batched
    assert actual.float32 == {"highest": turns * product}
    assert actual.collectives == {
        "all-gather": 512 * 512 * FLOAT,
        "collective-permute": turns * 1024 * 512 * FLOAT,
        "all-reduce": (512 + 7 * 512) * FLOAT,
    }
    assert actual.loops_once == 0
    # The weight in each turn, and the gather's operand and result; all else but the counters lies on the chip.
    assert actual.bytes == pytest.approx(FLOAT * 512 * 512 * turns + FLOAT * (64 + 512) * 512, rel=1e-4)


SCATTER = """HloModule jit_f, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %c = f32[]{:T(128)} add(%a, %b)
}

%all-reduce-scatter.1 (input: f32[64,32]) -> f32[16,32] {
  %input = f32[64,32]{1,0:T(8,128)} parameter(0)
  %all-reduce.1 = f32[64,32]{1,0:T(8,128)} all-reduce(%input), channel_id=2, replica_groups={{0,1,2,3}}, to_apply=%add
  %id = u32[] partition-id()
  %zero = u32[] constant(0)
  ROOT %own = f32[16,32]{1,0:T(8,128)} dynamic-slice(%all-reduce.1, %id, %zero), dynamic_slice_sizes={16,32}
}

ENTRY %main (x: f32[64,32]) -> f32[16,32] {
  %x = f32[64,32]{1,0:T(8,128)} parameter(0)
  ROOT %fusion = f32[16,32]{1,0:T(8,128)} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


def test_a_scatter_of_the_tpu_compiler_is_no_sum_for_every_device():
    assert program.work(SCATTER).collectives == {"reduce-scatter": 64 * 32 * FLOAT}
    summed = program.work(SCATTER.replace("all-reduce-scatter.1", "fused_computation"))
    assert summed.collectives == {"all-reduce": 64 * 32 * FLOAT}


def test_a_loop_whose_start_is_not_known_counts_once():
    actual = program.work(TPU.replace("%copy.2 = s32[] copy(%zero)", "%copy.2 = s32[] partition-id()"))
    assert actual.loops_once == 1
    assert actual.collectives["collective-permute"] == 1024 * 512 * FLOAT


def test_other_texts_are_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        program.work("module @jit_f {\n}")


# As XLA writes it for GPUs: libraries called by name, what they sum over in a note for them.
GPU = """HloModule jit_f, is_scheduled=true

%gemm_fusion (a: bf16[64,32], b: bf16[32,16]) -> bf16[64,16] {
  %a = bf16[64,32]{1,0} parameter(0)
  %b = bf16[32,16]{1,0} parameter(1)
  ROOT %dot = bf16[64,16]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (x: bf16[8,64,32], w: bf16[8,32,16], i: f32[10,20,30,4], k: f32[3,3,4,6], g: f32[10,20,30,6]) -> f32[] {
  %x = bf16[8,64,32]{2,1,0} parameter(0)
  %w = bf16[8,32,16]{2,1,0} parameter(1)
  %i = f32[10,20,30,4]{3,2,1,0} parameter(2)
  %k = f32[3,3,4,6]{3,2,1,0} parameter(3)
  %g = f32[10,20,30,6]{3,2,1,0} parameter(4)
  %a.1 = bf16[64,32]{1,0} bitcast(%x)
  %b.1 = bf16[32,16]{1,0} bitcast(%w)
  %triton = bf16[64,16]{1,0} fusion(%a.1, %b.1), kind=kCustom, calls=%gemm_fusion, metadata={op_name="a"}
  %gemm = (f32[8,64,16]{2,1,0}, s8[4194304]{0}) custom-call(%x, %w), custom_call_target="__cublas$gemm", <GEMM>
  %lt = (f32[8,64,16]{2,1,0}, s8[4194304]{0}) custom-call(%x, %w, %b.1), custom_call_target="__cublas$lt$matmul", <GEMM>
  %u = f32[8,64,32]{2,1,0} convert(%x)
  %v = f32[8,32,16]{2,1,0} convert(%w)
  %full = (f32[8,64,16]{2,1,0}, s8[4194304]{0}) custom-call(%u, %v), custom_call_target="__cublas$gemm", <GEMM>
  %tf32 = (f32[8,64,16]{2,1,0}, s8[4194304]{0}) custom-call(%u, %v), custom_call_target="__cublas$gemm", <LOW GEMM>
  %out = (f32[10,20,30,6]{3,2,1,0}, u8[0]{0}) custom-call(%i, %k), <CONV>, <TARGET>Forward"
  %of_i = (f32[10,20,30,4]{3,2,1,0}, u8[0]{0}) custom-call(%g, %k), <CONV>, <TARGET>BackwardInput"
  %of_k = (f32[3,3,4,6]{3,2,1,0}, u8[0]{0}) custom-call(%i, %g), <CONV>, <TARGET>BackwardFilter"
  %attention = (bf16[8,64,32]{2,1,0}, u8[0]{0}) custom-call(%x, %x, %x), custom_call_target="__cudnn$fmhaSoftmax"
  %sharding = bf16[8,64,32]{2,1,0} custom-call(%x), custom_call_target="Sharding"
  ROOT %zero = f32[] constant(0)
}
"""
GPU = GPU.replace("<TARGET>", 'custom_call_target="__cudnn$conv').replace(
    "<CONV>", "window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f"
)
for name, at in (("<GEMM>", "HIGHEST"), ("<LOW GEMM>", "DEFAULT")):
    GPU = GPU.replace(
        name,
        'backend_config={"gemm_backend_config":{"beta":0,"dot_dimension_numbers":{"lhs_contracting_dimensions":["2"],'
        '"rhs_contracting_dimensions":["1"],"lhs_batch_dimensions":["0"],"rhs_batch_dimensions":["0"]},'
        f'"precision_config":{{"operand_precision":["{at}","{at}"],"algorithm":"ALG_UNSET"}}}}}}',
    )


def test_text_of_the_gpu_compiler():
    """Products in libraries count as if they were written out, a gradient of a convolution as much as itself."""
    actual = program.work(GPU)
    product = 2 * 64 * 32 * 16
    convolution = 2 * 10 * 4 * 6 * (3 * 20 - 2) * (3 * 30 - 2)  # without the padding at both ends
    assert actual.flops == product + 4 * 8 * product + 3 * convolution
    assert actual.float32 == {"highest": 8 * product, "default": 8 * product + 3 * convolution}
    assert actual.hidden == 1  # the attention


BESIDE = """HloModule m, is_scheduled=true

%start (p0: f32[2,4]) -> (f32[2,4], f32[8,4], u32[]) {
  %p0 = f32[2,4]{1,0} parameter(0)
  %all-gather.1 = f32[8,4]{1,0} all-gather(%p0), channel_id=1, dimensions={0}
  ROOT %custom-call.1 = (f32[2,4]{1,0}, f32[8,4]{1,0}, u32[]{:S(2)}) custom-call(%all-gather.1), custom_call_target="S"
}

%async_collective_fusion.3 (q0: f32[2,4], q1: f32[8,4], q2: f32[5]) -> (f32[5], f32[2,4], f32[8,4]) {
  %q0 = f32[2,4]{1,0} parameter(0)
  %q1 = f32[8,4]{1,0} parameter(1)
  %q2 = f32[5]{0} parameter(2)
  %add.1 = f32[5]{0} add(%q2, %q2)
  %all-gather.2 = f32[8,4]{1,0} all-gather(%q0), channel_id=1, dimensions={0}
  ROOT %tuple.1 = (f32[5]{0}, f32[2,4]{1,0}, f32[8,4]{1,0}) tuple(%add.1, %q0, %all-gather.2)
}

%done (r0: f32[2,4], r1: f32[8,4]) -> f32[8,4] {
  %r0 = f32[2,4]{1,0} parameter(0)
  %r1 = f32[8,4]{1,0} parameter(1)
  %all-gather.3 = f32[8,4]{1,0} all-gather(%r0), channel_id=1, dimensions={0}
  ROOT %custom-call.2 = f32[8,4]{1,0} custom-call(%r0, %r1, %all-gather.3), custom_call_target="D"
}

%condition (c: (s32[], f32[5], f32[2,4], f32[8,4])) -> pred[] {
  %c = (s32[], f32[5]{0}, f32[2,4]{1,0}, f32[8,4]{1,0}) parameter(0)
  ROOT %pred = pred[] constant(true)
}

%body (b: (s32[], f32[5], f32[2,4], f32[8,4])) -> (s32[], f32[5], f32[2,4], f32[8,4]) {
  %b = (s32[], f32[5]{0}, f32[2,4]{1,0}, f32[8,4]{1,0}) parameter(0)
  %b0 = s32[] get-tuple-element(%b), index=0
  %b1 = f32[5]{0} get-tuple-element(%b), index=1
  %b2 = f32[2,4]{1,0} get-tuple-element(%b), index=2
  %b3 = f32[8,4]{1,0} get-tuple-element(%b), index=3
  %fusion.3 = (f32[5]{0}, f32[2,4]{1,0}, f32[8,4]{1,0}) fusion(%b2, %b3, %b1), kind=kOutput, output_to_operand_aliasing={{1}: (0, {}), {2}: (1, {})}, calls=%async_collective_fusion.3
  %f0 = f32[5]{0} get-tuple-element(%fusion.3), index=0
  %f1 = f32[2,4]{1,0} get-tuple-element(%fusion.3), index=1
  %f2 = f32[8,4]{1,0} get-tuple-element(%fusion.3), index=2
  ROOT %next = (s32[], f32[5]{0}, f32[2,4]{1,0}, f32[8,4]{1,0}) tuple(%b0, %f0, %f1, %f2)
}

ENTRY %main (x: f32[2,4], y: f32[5]) -> f32[8,4] {
  %x = f32[2,4]{1,0} parameter(0)
  %y = f32[5]{0} parameter(1)
  %zero = s32[] constant(0)
  %async-collective-start = (f32[2,4]{1,0}, f32[8,4]{1,0}, u32[]{:S(2)}) fusion(%x), kind=kCustom, calls=%start
  %s0 = f32[2,4]{1,0} get-tuple-element(%async-collective-start), index=0
  %s1 = f32[8,4]{1,0} get-tuple-element(%async-collective-start), index=1
  %first = (s32[], f32[5]{0}, f32[2,4]{1,0}, f32[8,4]{1,0}) tuple(%zero, %y, %s0, %s1)
  %while.1 = (s32[], f32[5]{0}, f32[2,4]{1,0}, f32[8,4]{1,0}) while(%first), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"10"}}
  %w2 = f32[2,4]{1,0} get-tuple-element(%while.1), index=2
  %w3 = f32[8,4]{1,0} get-tuple-element(%while.1), index=3
  ROOT %async-collective-done = f32[8,4]{1,0} fusion(%w2, %w3), kind=kCustom, calls=%done
}
"""  # noqa: E501


def test_a_collective_beside_the_work_of_a_loop_counts_once():
    """A TPU's program names it in the fusion that starts it, in each that goes on with it, and in the last one."""
    counted = program.work(BESIDE)
    assert counted.collectives == {"all-gather": 8 * 4 * 4}
    start = (2 * 4 + 2 * 4 + 8 * 4) * 4  # reads what is sent; its results are that and the whole
    assert counted.bytes == start + 10 * (5 + 5) * 4
