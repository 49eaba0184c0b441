"""What is read of a compiled program, from texts as the compilers of CPUs, GPUs and TPUs write them."""

import jax
import jax.numpy as jnp
import pytest

from wavepath.errors import WavepathError
from wavepath.planning import hlo, hlo_text

HEAD = """HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[8]{0})->f32[8]{0}}, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}
"""
ENTRY = """
ENTRY %main (p: f32[8,4], q: bf16[16]) -> f32[8,4] {
  %p = f32[8,4]{1,0} parameter(0)
  %q = bf16[16]{0} parameter(1)
"""


def read(lines, *before):
    """A program of lines in the main computation, with other computations before it."""
    return hlo.read(HEAD + "\n".join(before) + ENTRY + "".join(f"  {line}\n" for line in lines) + "}\n")


def one(*lines):
    """The only collective of such lines."""
    program = read(lines)
    assert len(program.collectives) == 1
    return program.collectives[0]


@pytest.mark.parametrize(("text", "dtype", "dims", "size", "stored", "space"), [
    ("f32[8,4]{1,0}", "f32", (8, 4), 128, 128, 0),
    ("bf16[16]", "bf16", (16,), 32, 32, 0),
    ("pred[]", "pred", (), 1, 1, 0),
    ("s4[6]{0:E(4)}", "s4", (6,), 3, 3, 0),
    ("u8[3,5]{1,0}", "u8", (3, 5), 15, 15, 0),
    ("c64[2]{0}", "c64", (2,), 16, 16, 0),
    ("f8e4m3fn[10]{0}", "f8e4m3fn", (10,), 10, 10, 0),
    ("token[]", "token", (), 0, 0, 0),
    ("f32[<=7]{0}", "f32", (7,), 28, 28, 0),
    ("bf16[50,64]{1,0:T(8,128)(2,1)}", "bf16", (50, 64), 6400, 56 * 128 * 2, 0),
    ("f32[3,128]{0,1:T(8,128)S(1)}", "f32", (3, 128), 1536, 128 * 128 * 4, 1),
    ("f32[600]{0:T(512)S(5)}", "f32", (600,), 2400, 4096, 5),
])
def test_sizes_of_arrays(text, dtype, dims, size, stored, space):
    (shape,) = hlo_text.shapes(text)
    assert (shape.dtype, shape.dims, shape.bytes, shape.stored, shape.space) == (dtype, dims, size, stored, space)


def test_a_tuple_has_the_shapes_of_all_its_parts():
    text = "((bf16[4]{0:T(256)(128)(2,1)S(1)}, f32[]{:T(128)}), /*index=5*/u32[2]{0})"
    assert [shape.bytes for shape in hlo_text.shapes(text)] == [8, 4, 8]


@pytest.mark.parametrize(("attribute", "group", "groups"), [
    ("replica_groups={{0,1,2,3},{4,5,6,7}}", 4, 2),
    ("replica_groups={}", 8, 1),
    ("replica_groups=[2,4]<=[8]", 4, 2),
    ("replica_groups=[4,2]<=[2,4]T(1,0)", 2, 4),
    ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", 4, 2),
    ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0','axis_1'}", 8, 1),
    ("replica_groups=mesh['axis_0'=8] {'axis_0':(2)4}", 4, 2),
    ("channel_id=3", 8, 1),
])
def test_groups_of_devices(attribute, group, groups):
    got = one(f"ROOT %r = f32[8,4]{{1,0}} all-reduce(%p), {attribute}, to_apply=%add")
    assert (got.kind, got.bytes, got.group, got.groups, got.times, got.dtype) == ("all-reduce", 128, group, groups, 1, "f32")


@pytest.mark.parametrize(("line", "kind", "size"), [
    ("ROOT %r = f32[64,4]{1,0} all-gather(%p), replica_groups=[1,8]<=[8], dimensions={0}", "all-gather", 1024),
    ("ROOT %r = f32[1,4]{1,0} reduce-scatter(%p), replica_groups=[1,8]<=[8], dimensions={0}, to_apply=%add", "reduce-scatter", 128),
    ("ROOT %r = (f32[8,4]{1,0}, bf16[16]{0}) all-reduce(%p, %q), replica_groups={}, to_apply=%add", "all-reduce", 160),
    ("ROOT %r = f32[8,4]{1,0} all-to-all(%p), replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}", "all-to-all", 128),
    ("ROOT %r = f32[8,4]{1,0} collective-permute(%p), source_target_pairs={{0,1},{1,0},{2,3},{3,2}}", "collective-permute", 128),
    # operands with their types before their names, and names without a sign
    ("ROOT %r = f32[64,4]{1,0} all-gather(f32[8,4]{1,0} %p), replica_groups=[1,8]<=[8], dimensions={0}", "all-gather", 1024),
    # metadata that looks like a program
    ('ROOT %r = f32[8,4]{1,0} all-reduce(%p), replica_groups={}, to_apply=%add, metadata={op_name="f(x)/body=%p all-gather(%q)"}', "all-reduce", 128),
])
def test_bytes_of_each_kind(line, kind, size):
    got = one(line)
    assert (got.kind, got.bytes) == (kind, size)
    assert got.group == (2 if kind == "collective-permute" else 8)


@pytest.mark.parametrize(("lines", "kind", "size"), [
    (("%s = (f32[8,4]{1,0}, f32[64,4]{1,0}) all-gather-start(%p), replica_groups=[1,8]<=[8], dimensions={0}",
      "ROOT %d = f32[64,4]{1,0} all-gather-done(%s)"), "all-gather", 1024),
    (("%s = f32[8,4]{1,0} all-reduce-start(%p), replica_groups=[1,8]<=[8], to_apply=%add", "ROOT %d = f32[8,4]{1,0} all-reduce-done(%s)"),
     "all-reduce", 128),
    (("%s = (f32[8,4]{1,0}, f32[8,4]{1,0:S(1)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%p), source_target_pairs={{0,1},{1,0}}",
      "ROOT %d = f32[8,4]{1,0} collective-permute-done(%s)"), "collective-permute", 128),
    (("%s = ((f32[8,4]{1,0}), f32[1,4]{1,0}) reduce-scatter-start(%p), replica_groups=[1,8]<=[8], dimensions={0}, to_apply=%add",
      "ROOT %d = f32[1,4]{1,0} reduce-scatter-done(%s)"), "reduce-scatter", 128),
])
def test_a_start_and_its_done_count_once(lines, kind, size):
    got = one(*lines)
    assert (got.kind, got.bytes) == (kind, size)


def test_a_wrapped_collective_counts_once():
    wrapped = """
%wrapped (x: f32[8,4]) -> f32[1,4] {
  %x = f32[8,4]{1,0} parameter(0)
  ROOT %rs = f32[1,4]{1,0} reduce-scatter(%x), replica_groups={}, dimensions={0}, to_apply=%add
}
"""
    program = read((
        "%s = ((f32[8,4]{1,0}), f32[1,4]{1,0}, u32[]) async-start(%p), calls=%wrapped",
        "%u = ((f32[8,4]{1,0}), f32[1,4]{1,0}, u32[]) async-update(%s), calls=%wrapped",
        "ROOT %d = f32[1,4]{1,0} async-done(%u), calls=%wrapped",
    ), wrapped)  # fmt: skip
    assert [(found.kind, found.times) for found in program.collectives] == [("reduce-scatter", 1)]


def test_a_gathering_spread_over_fusions_of_a_tpu_counts_once_and_its_sum_and_slice_is_a_scatter():
    part = """
%NAME (x: f32[8,4]) -> f32[64,4] {
  %x = f32[8,4]{1,0} parameter(0)
  ROOT %gather.NAME = f32[64,4]{1,0} all-gather(%x), channel_id=58, replica_groups=mesh['a'=8] {'a'}, dimensions={0}, backend_config={"x":["y"]}
}
"""
    scatter = """
%all-reduce-scatter.1 (x: f32[8,4]) -> f32[1,4] {
  %x = f32[8,4]{1,0} parameter(0)
  %sum = f32[8,4]{1,0} all-reduce(%x), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  %zero = s32[] constant(0)
  ROOT %slice = f32[1,4]{1,0} dynamic-slice(%sum, %zero, %zero), dynamic_slice_sizes={1,4}
}
"""
    program = read((
        "%a = f32[64,4]{1,0} fusion(%p), kind=kCustom, calls=%first", "%b = f32[64,4]{1,0} fusion(%p), kind=kCustom, calls=%second",
        "ROOT %c = f32[1,4]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1",
    ), part.replace("NAME", "first"), part.replace("NAME", "second"), scatter)  # fmt: skip
    assert hlo.summary(program) == {
        "all-gather": {"count": 1, "executions": 1, "bytes": 1024}, "reduce-scatter": {"count": 1, "executions": 1, "bytes": 128},
    }


LOOP = """
%body (s: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %s = (s32[], f32[8,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %step = s32[] constant(STEP)
  %next = s32[] add(%i, %step)
  %x = f32[8,4]{1,0} get-tuple-element(%s), index=1
  %y = f32[8,4]{1,0} all-reduce(%x), replica_groups={}, to_apply=%add
  ROOT %t = (s32[], f32[8,4]{1,0}) tuple(%next, %y)
}

%condition (s: (s32[], f32[8,4])) -> pred[] {
  %s = (s32[], f32[8,4]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%s), index=0
  %last = s32[]{:T(128)} constant(LAST)
  ROOT %test = pred[] compare(%i, %last), direction=LT
}
"""


def looped(first, last, step, direction="LT", note=""):
    loop = LOOP.replace("STEP", str(step)).replace("LAST", str(last)).replace("direction=LT", f"direction={direction}")
    return read((
        f"%first = s32[] constant({first})", "%copied = s32[] copy(%first)", "%start = (s32[], f32[8,4]{1,0}) tuple(%copied, %p)",
        f"%loop = (s32[], f32[8,4]{{1,0}}) while(%start), condition=%condition, body=%body{note}",
        "ROOT %r = f32[8,4]{1,0} get-tuple-element(%loop), index=1",
    ), loop)  # fmt: skip


@pytest.mark.parametrize(("first", "last", "step", "direction", "times"), [
    (0, 12, 1, "LT", 12), (0, 7, 2, "LT", 4), (1, 12, 1, "LE", 12), (11, 0, -1, "GE", 12), (0, 12, 1, "NE", 12), (5, 5, 1, "LT", 0),
])
def test_a_loop_multiplies_what_is_in_it(first, last, step, direction, times):
    program = looped(first, last, step, direction)
    table = hlo.summary(program)
    assert table.get("all-reduce", {"executions": 0})["executions"] == times
    assert not program.unknown
    if times:
        assert table["all-reduce"] == {"count": 1, "executions": times, "bytes": times * 128}


def test_what_the_compiler_noted_goes_before_and_what_nobody_says_counts_once():
    note = ', backend_config={"known_trip_count":{"n":"9"}}'
    assert looped(0, 12, 1, note=note).collectives[0].times == 9
    program = looped(0, 12, 1, direction="EQ")
    assert program.collectives[0].times == 1 and program.unknown == ("loop",)


@pytest.mark.parametrize("opcode", ["collective-broadcast", "ragged-all-to-all", "all-shuffle"])
def test_an_unknown_collective_is_an_error(opcode):
    with pytest.raises(WavepathError, match=f"'r'.*kind '{opcode}'.*all-reduce"):
        one(f"ROOT %r = f32[8,4]{{1,0}} {opcode}(%p), replica_groups={{}}")


@pytest.mark.parametrize("text", ["", "module {\n}", "func.func public @main() {\n  return\n}"])
def test_what_is_no_program_is_an_error(text):
    with pytest.raises(WavepathError, match="not an HLO module"):
        hlo.read(text)


@pytest.mark.parametrize(("line", "flops"), [
    ("%r = f32[8,8]{1,0} dot(%p, %p), lhs_contracting_dims={1}, rhs_contracting_dims={1}", 2 * 8 * 8 * 4),
    ('%r = (f32[8,8]{1,0}, s8[32]{0}) custom-call(%p, %p), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":'
     '{"alpha_real":1,"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["1"]}}}', 2 * 8 * 8 * 4),
    ("%r = f32[8,8]{1,0} convolution(%p, %p), dim_labels=bf_oi->bf", 2 * 8 * 8 * 4),
    # eight products of [1, 4] and [4, 1], as a TPU writes them: a window over a dilated input, of which one place is met
    ("%r = f32[8,1,1]{2,1,0} convolution(%b, %b), window={size=8 stride=7 lhs_dilate=8}, dim_labels=0bf_0oi->0bf", 2 * 8 * 4),
    ("%r = f32[1,8,2]{2,1,0} convolution(%x, %k), window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f", 2 * (3 * 8 - 2) * 4 * 2),
    ("%r = f32[1,8,4]{2,1,0} convolution(%x, %d), window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f, feature_group_count=4", 2 * (3 * 8 - 2) * 4),
    ("%r = f32[8,4]{1,0} add(%p, %p)", 0),
])  # fmt: skip
def test_operations_of_products(line, flops):
    arrays = {"k": "f32[3,4,2]{2,1,0}", "d": "f32[3,1,4]{2,1,0}", "b": "f32[8,1,4]{2,1,0}", "x": "f32[1,8,4]{2,1,0}"}
    program = read([*(f"%{name} = {shape} constant({{...}})" for name, shape in arrays.items()), f"ROOT {line}"])
    assert program.flops == flops and program.by_type == ({"f32": flops} if flops else {})


def test_precision_is_told_apart_and_custom_calls_are_named():
    program = read((
        '%c = f32[8,4]{1,0} custom-call(%p), custom_call_target="mystery"',
        *(f'%{name[0]} = f32[8,4]{{1,0}} custom-call(%p), custom_call_target="{name}"' for name in hlo._FREE_CALLS),
        "ROOT %r = f32[8,8]{1,0} dot(%p, %c), lhs_contracting_dims={1}, rhs_contracting_dims={1}, operand_precision={highest,highest}",
    ))  # fmt: skip
    assert program.by_type == {"f32:highest": 512.0} and program.opaque == ("mystery",)


@pytest.mark.parametrize(("lines", "traffic"), [
    (["ROOT %r = f32[8,4]{1,0} add(%p, %p)"], 3 * 128),
    (["ROOT %r = f32[8,4]{1,0:S(1)} add(%p, %p)"], 2 * 128),  # the result stays in vector memory
    (["%s = (f32[8,4]{1,0:S(1)}, f32[8,4]{1,0}, u32[]) copy-start(%p)", "ROOT %r = f32[8,4]{1,0:S(1)} copy-done(%s)"], 128),
    (["%s = ((f32[8,4]{1,0}), f32[2,4]{1,0:S(1)}, s32[]) slice-start(%p), slice={[0:2], [0:4]}", "ROOT %r = f32[2,4]{1,0:S(1)} slice-done(%s)"], 32),
    (["ROOT %r = f32[1,4]{1,0} slice(%p), slice={[0:1], [0:4]}"], 32),
    (["%t = (f32[8,4]{1,0}) tuple(%p)", "%g = f32[8,4]{1,0} get-tuple-element(%t), index=0", "ROOT %r = f32[32]{0} bitcast(%g)"], 0),
    (["ROOT %r = f32[64,4]{1,0} all-gather(%p), replica_groups={}, dimensions={0}"], 128 + 1024),
])  # fmt: skip
def test_traffic(lines, traffic):
    assert read(lines).traffic == traffic


@pytest.mark.parametrize(("lines", "traffic"), [
    # in place: the update and its place are read, and the update is written
    (["ROOT %r = f32[8,4]{1,0} dynamic-update-slice(%a, %b, %i, %zero)"], 16 + 4 + 16),
    (["%n = f32[8,4]{1,0} negate(%a)", "ROOT %r = f32[8,4]{1,0} dynamic-update-slice(%n, %b, %i, %zero)"], 128 + 16 + 4 + 16),
    # of a slice no more is read than the slice, of an operand without use nothing
    (["%s = f32[1,4]{1,0} dynamic-slice(%a, %i, %zero)", "ROOT %r = f32[8,4]{1,0} pad(%s, %zero), padding=0_7x0_0"], 16 + 4 + 128),
])
def test_traffic_of_fusions_that_slice(lines, traffic):
    fused = """
%fused (a: f32[8,4], b: f32[1,4], i: s32[]) -> f32[8,4] {
  %a = f32[8,4]{1,0} parameter(0)
  %b = f32[1,4]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %zero = s32[] constant(0)
"""
    fused += "".join(f"  {line}\n" for line in lines) + "}\n"
    call = ["%b = f32[1,4]{1,0} constant({...})", "%i = s32[] constant(3)", "ROOT %r = f32[8,4]{1,0} fusion(%p, %b, %i), kind=kLoop, calls=%fused"]
    assert read(call, fused).traffic == traffic


def test_a_compiled_loop_of_products_counts_all_of_them():
    """Against the shapes, and, for one body, against XLA's own count, which counts a loop once."""

    def model(weights, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0].sum()

    shapes = jax.ShapeDtypeStruct((5, 16, 16), jnp.float32), jax.ShapeDtypeStruct((8, 16), jnp.float32)
    compiled = jax.jit(jax.grad(model)).lower(*shapes).compile()
    program = hlo.read(compiled.as_text())
    assert program.flops == 3 * 5 * 2 * 8 * 16 * 16 and not program.collectives and not program.unknown
    one = jax.jit(lambda x, w: x @ w).lower(jax.ShapeDtypeStruct((8, 16), jnp.float32), jax.ShapeDtypeStruct((16, 4), jnp.float32)).compile()
    assert hlo.read(one.as_text()).flops == one.cost_analysis()["flops"] == 2 * 8 * 16 * 4
