"""What a compiled program does: from texts short enough to be counted by hand, and against the count of the jaxpr."""

import pytest

from dexportrait_jax.collectives import Grid
from dexportrait_jax.compiled_program import read_program
from dexportrait_jax.hlo import size

LOOP = """
HloModule jit_f, is_scheduled=true

%piece (p.0: f32[8,128,256], p.1: s32[]) -> f32[128,256] {
  %p.0 = f32[8,128,256]{2,1,0:T(8,128)} parameter(0)
  %p.1 = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %cut = f32[1,128,256]{2,1,0:T(8,128)} dynamic-slice(%p.0, %p.1, %zero, %zero), dynamic_slice_sizes={1,128,256}
  ROOT %flat = f32[128,256]{1,0:T(8,128)} bitcast(%cut)
}

%product (p.2: f32[64,128], p.3: f32[128,256]) -> f32[64,256] {
  %p.2 = f32[64,128]{1,0:T(8,128)} parameter(0)
  %p.3 = f32[128,256]{1,0:T(8,128)} parameter(1)
  ROOT %convolution.1 = f32[64,256]{1,0:T(8,128)} convolution(%p.2, %p.3), dim_labels=bf_io->bf
}

%body (p.4: (s32[], f32[64,128], f32[8,128,256])) -> (s32[], f32[64,128], f32[8,128,256]) {
  %p.4 = (s32[]{:T(128)}, f32[64,128]{1,0:T(8,128)}, f32[8,128,256]{2,1,0:T(8,128)}) parameter(0)
  %two = s32[]{:T(128)} constant(2)
  %i = s32[]{:T(128)} get-tuple-element(%p.4), index=0
  %x = f32[64,128]{1,0:T(8,128)} get-tuple-element(%p.4), index=1
  %w = f32[8,128,256]{2,1,0:T(8,128)} get-tuple-element(%p.4), index=2
  %weights = f32[128,256]{1,0:T(8,128)} fusion(%w, %i), kind=kLoop, calls=%piece
  %y = f32[64,256]{1,0:T(8,128)S(1)} fusion(%x, %weights), kind=kOutput, calls=%product
  %next = s32[]{:T(128)} add(%i, %two)
  ROOT %result = (s32[]{:T(128)}, f32[64,128]{1,0:T(8,128)}, f32[8,128,256]{2,1,0:T(8,128)}) tuple(%next, %x, %w)
}

%condition (p.5: (s32[], f32[64,128], f32[8,128,256])) -> pred[] {
  %p.5 = (s32[]{:T(128)}, f32[64,128]{1,0:T(8,128)}, f32[8,128,256]{2,1,0:T(8,128)}) parameter(0)
  %end = s32[]{:T(128)} constant(8)
  %j = s32[]{:T(128)} get-tuple-element(%p.5), index=0
  ROOT %less = pred[]{:T(512)} compare(%j, %end), direction=LT
}

ENTRY %main (a: f32[64,128], b: f32[8,128,256]) -> f32[64,128] {
  %a = f32[64,128]{1,0:T(8,128)} parameter(0)
  %b = f32[8,128,256]{2,1,0:T(8,128)} parameter(1)
  %one = s32[]{:T(128)} constant(1)
  %first = s32[]{:T(128)} copy(%one)
  %start = (s32[]{:T(128)}, f32[64,128]{1,0:T(8,128)}, f32[8,128,256]{2,1,0:T(8,128)}) tuple(%first, %a, %b)
  %loop = (s32[], f32[64,128]{1,0}, f32[8,128,256]{2,1,0}) while(%start), condition=%condition, body=%body
  ROOT %out = f32[64,128]{1,0:T(8,128)} get-tuple-element(%loop), index=1
}
"""


def test_a_loop_counts_as_often_as_it_runs():
    program = read_program(LOOP)
    # 1, 3, 5, 7: four times.
    assert program.flops == 4 * 2 * 64 * 128 * 256
    assert program.unknown_loops == []
    weights, inputs = 128 * 256 * 4, 64 * 128 * 4
    # A piece of the stack is read, and written as weights; the product reads it again, and keeps its result on chip.
    counters = 3 * 4 * 4 + 2 * 4  # next reads two and writes one, four times; first is a copy
    index = 4 * 4  # the place of the piece
    assert program.hbm_bytes == 4 * (2 * weights + weights + inputs) + counters + index


@pytest.mark.parametrize(("precision", "passes"), [("highest", 6), ("high", 3), ("default", 1)])
def test_float32_at_high_precision_is_several_passes_in_bfloat16(precision, passes):
    given = f"operand_precision={{{precision},{precision}}}"
    text = LOOP.replace("dim_labels=bf_io->bf", f"dim_labels=bf_io->bf, {given}")
    program = read_program(text)
    assert program.flops == 4 * 2 * 64 * 128 * 256
    assert program.matrix_flops == passes * program.flops
    # Of bfloat16 there is nothing more to multiply.
    halves = read_program(text.replace("f32[", "bf16["))
    assert halves.matrix_flops == halves.flops == program.flops


def test_a_loop_of_unknown_length_is_named_and_counted_once():
    program = read_program(LOOP.replace("direction=LT", "direction=NE"))
    assert program.unknown_loops == ["loop"]
    assert program.flops == 2 * 64 * 128 * 256


@pytest.mark.parametrize(
    "line",
    [
        "call(%x, %weights), to_apply=%product",
        "conditional(%i, %weights, %x), branch_computations={%piece, %product}",
        "conditional(%less, %x, %weights), true_computation=%product, false_computation=%piece",
    ],
)
def test_what_a_loop_calls_or_chooses_counts_as_often(line):
    """Of a choice the dearest: the product, and not the cut."""
    fusion = "fusion(%x, %weights), kind=kOutput, calls=%product"
    assert fusion in LOOP
    program = read_program(LOOP.replace(fusion, line))
    assert program.flops == 4 * 2 * 64 * 128 * 256 and program.unknown_loops == []


def entry(*lines):
    return "ENTRY %main () -> f32[] {\n" + "\n".join(f"  {line}" for line in lines) + "\n}\n"


OPERANDS = (
    "%x = bf16[16,1024]{1,0:T(8,128)(2,1)} parameter(0)",
    "%k = bf16[4,4,8,16]{3,2,1,0} parameter(1)",
)


@pytest.mark.parametrize(
    ("line", "kind", "received"),
    [
        # 32 KiB here and as much from each of three others.
        ("all-gather(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}", "all-gather", 3),
        ("reduce-scatter(%x), replica_groups=[2,4]<=[8], to_apply=%a", "reduce-scatter", 3 / 4),
        ("all-reduce(%x), replica_groups={{0,1,2,3}}, to_apply=%a", "all-reduce", 2 * 3 / 4),
        ("all-to-all(%x), replica_groups={{0,1}}, dimensions={0}", "all-to-all", 1 / 2),
        ("all-to-all(%x), replica_groups=mesh['a'=2,'b'=4] {'b'}", "all-to-all", 3 / 4),
        ("all-gather(%x), replica_groups=mesh['a'=2,'b'=4] {'a','b':(1)2}", "all-gather", 3),
        (
            "all-gather(%x), replica_groups=mesh['a'=4,'b'=2,'c'=2], device_ids=([4,2,2]T(0,2,1)) {'b'}",
            "all-gather",
            1,
        ),
        ("collective-permute(%x), source_target_pairs={{0,1},{1,0}}", "collective-permute", 1),
    ],
)
def test_collectives(line, kind, received):
    program = read_program(entry(*OPERANDS, f"%y = bf16[16,1024]{{1,0}} {line}"))
    found = program.collectives[kind]
    assert (found.count, found.bytes) == (1, received * 16 * 1024 * 2)
    assert program.between_slices == 0


def three_times(*lines):
    """A loop with these lines in it: its computations, and the lines that run it."""
    body = "\n  ".join(
        (
            "%turn (p: (s32[])) -> (s32[]) {",
            "%p = (s32[]) parameter(0)",
            "%i = s32[] get-tuple-element(%p), index=0",
            "%one = s32[] constant(1)",
            "%next = s32[] add(%i, %one)",
            *lines,
            "ROOT %r = (s32[]) tuple(%next)",
        )
    )
    test = """
}
%test (q: (s32[])) -> pred[] {
  %q = (s32[]) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %end = s32[] constant(3)
  ROOT %less = pred[] compare(%j, %end), direction=LT
}
"""
    return body + test, (
        "%first = s32[] constant(0)",
        "%start = (s32[]) tuple(%first)",
        "%loop = (s32[]) while(%start), condition=%test, body=%turn",
    )


def test_what_is_sent_in_a_loop_and_by_choice_is_added_up():
    """A reduction of 32 KiB between two neighbours, and a send of as much: here, in a choice, and three times over."""
    sending = (
        *OPERANDS[:1],
        "%y = bf16[16,1024]{1,0} all-reduce(%x), replica_groups={{0,1}}",
        "%t = token[] after-all()",
        "%s = (bf16[16,1024]{1,0}, u32[], token[]) send(%x, %t), channel_id=2, is_host_transfer=true, "
        'frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}',
    )
    chosen = entry(*sending).replace("ENTRY %main", "%chosen")
    choice = "%w = bf16[16,1024]{1,0} conditional(%first, %x), branch_computations={%chosen}"
    loop, lines = three_times(*sending)
    program = read_program(
        chosen + loop + entry(*sending, *lines, choice), Grid(((0, 0), (0, 1)), (False, False), 2)
    )
    found, sent = program.collectives["all-reduce"], 16 * 1024 * 2
    assert (found.count, found.bytes) == (5, 5 * sent)
    assert program.link_bytes == {(1,): 5 * sent} and program.between_slices == 5 * sent


def test_an_all_reduce_that_is_cut_later_is_one_all_the_same():
    """Alone in the program, and not in a fusion: every device has the whole before it cuts."""
    lines = (
        "%g = f32[64,1024]{1,0} parameter(0)",
        "%r = f32[64,1024]{1,0} all-reduce(%g), replica_groups={{0,2,4,6,8,10,12,14}}, to_apply=%a",
        "%n = u32[] constant(0)",
        "ROOT %d = f32[8,1024]{1,0} dynamic-slice(%r, %n, %n), dynamic_slice_sizes={8,1024}",
    )
    found = read_program(entry(*lines)).collectives
    assert set(found) == {"all-reduce"} and found["all-reduce"].bytes == 2 * 7 * 8 * 1024 * 4


def test_bytes_of_updates_and_of_copies_beside_other_work():
    """An update of 1 KiB in 8 MiB is read and written; a copy to a core's own memory is read alone."""
    operands = (
        "%big = f32[8192,256]{1,0} parameter(0)",
        "%piece = f32[1,256]{1,0} parameter(1)",
        "%i = s32[] parameter(2)",
    )
    update = "f32[8192,256]{1,0} dynamic-update-slice(%big, %piece, %i, %i)"
    assert read_program(entry(*operands, f"%u = {update}")).hbm_bytes == 2 * 1024
    fused = "%update (a: f32[8192,256]) -> f32[8192,256] {\n  " + "\n  ".join(operands)
    fused += f"\n  ROOT %u = {update}\n}}\n"
    line = "%f = f32[8192,256]{1,0} fusion(%big, %piece, %i), kind=kLoop, calls=%update"
    assert read_program(fused + entry(*operands, line)).hbm_bytes == 2 * 1024 + 4
    # What is cut from and read as a whole as well is read as a whole.
    mixed = """%mixed (p: f32[8,256]) -> f32[8,256] {
  %p = f32[8,256]{1,0} parameter(0)
  %c = f32[1,256]{1,0} slice(%p), slice={[0:1], [0:256]}
  %b = f32[8,256]{1,0} broadcast(%c), dimensions={0,1}
  ROOT %a = f32[8,256]{1,0} add(%p, %b)
}
"""
    lines = (
        "%x = f32[8,256]{1,0} parameter(0)",
        "%f = f32[8,256]{1,0} fusion(%x), kind=kLoop, calls=%mixed",
    )
    assert read_program(mixed + entry(*lines)).hbm_bytes == 2 * 8 * 1024
    for place, times in (("S(1)", 1), ("", 2)):
        copy = f"%c = (f32[1,256]{{1,0:{place}}}, f32[1,256]{{1,0}}, u32[]) copy-start(%piece)"
        assert read_program(entry(*operands, copy)).hbm_bytes == times * 1024


def test_a_collective_among_nobody_knows_whom_is_told():
    program = read_program(entry(*OPERANDS, "%y = bf16[16,1024]{1,0} all-reduce(%x), to_apply=%a"))
    assert program.collectives["all-reduce"].count == 1
    assert program.unknown_kernels == ["all-reduce"]


def test_a_collective_beside_products_is_counted_at_its_start():
    """The text of libtpu: start, middle and end are three fusions, each with the collective in it."""
    parts = []
    for name, flags, tail in (
        ("start", ("-1", "-1"), 'custom-call(%g), custom_call_target="AsyncCollectiveStart"'),
        ("middle", ("2", "8"), "tuple(%g)"),
        ("end", ("2", "8"), 'custom-call(%g), custom_call_target="AsyncCollectiveDone"'),
    ):
        config = f'{{"async_collective_fusion_config":{{"flag_start":"{flags[0]}","flag_end":"{flags[1]}"}}}}'
        parts.append(
            f"%{name} (p: bf16[16,1024]) -> bf16[32,1024] {{\n"
            "  %p = bf16[16,1024]{1,0} parameter(0)\n"
            f"  %g = bf16[32,1024]{{1,0}} all-gather(%p), replica_groups={{{{0,1}}}}, backend_config={config}\n"
            f"  ROOT %r = bf16[32,1024]{{1,0}} {tail}\n}}\n"
        )
    fusions = [
        f"%f.{name} = bf16[32,1024]{{1,0}} fusion(%x), kind=kCustom, calls=%{name}"
        for name in ("start", "middle", "end")
    ]
    program = read_program("\n".join(parts) + entry(*OPERANDS, *fusions))
    found = program.collectives["all-gather"]
    assert (found.count, found.bytes) == (1, 16 * 1024 * 2)
    # Read and written once, as the same gathering alone.
    assert program.hbm_bytes == (16 + 32) * 1024 * 2


def test_a_fused_reduce_scatter():
    """Libtpu's form of it: an all-reduce, of which the device's part is cut. It receives that part from each other."""
    fused = (
        "%all-reduce-scatter.1 (i: f32[64,1024]) -> f32[8,1024] {\n"
        "  %i = f32[64,1024]{1,0} parameter(0)\n"
        "  %r = f32[64,1024]{1,0} all-reduce(%i), replica_groups={{0,2,4,6,8,10,12,14}}, to_apply=%a\n"
        "  %n = u32[] constant(0)\n"
        "  ROOT %d = f32[8,1024]{1,0} dynamic-slice(%r, %n, %n), dynamic_slice_sizes={8,1024}\n}\n"
    )
    lines = (
        "%g = f32[64,1024]{1,0} parameter(0)",
        "%s = f32[8,1024]{1,0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.1",
    )
    program = read_program(fused + entry(*lines))
    found = program.collectives["reduce-scatter"]
    assert (found.count, found.bytes) == (1, 7 * 8 * 1024 * 4)
    assert set(program.collectives) == {"reduce-scatter"}


@pytest.mark.parametrize(("slices", "share"), [(2, 1.0), (4, 1.5), (8, 1.75)])
def test_what_crosses_slices(slices, share):
    grid = Grid(((0, 0),) * slices, (False, False), slices)
    program = read_program(
        entry(
            *OPERANDS,
            "%t = token[] after-all()",
            "%s = (bf16[16,1024]{1,0}, u32[], token[]) send(%x, %t), channel_id=2, is_host_transfer=true, "
            'frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",'
            '_xla_megascale_transfer_type="ALL_REDUCE"}',
        ),
        grid,
    )
    assert program.between_slices == share * 16 * 1024 * 2 and program.collectives == {}


@pytest.mark.parametrize(
    ("shapes", "attributes", "macs"),
    [
        # 3 x 3 with padding, 32 to 64 channels, on 2 x 20 x 20.
        (
            ("2,20,20,32", "3,3,32,64", "2,20,20,64"),
            "window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f",
            2 * 400 * 9 * 32 * 64,
        ),
        # Its gradient to the kernel: the 20 x 20 positions are the window.
        (
            ("32,20,20,2", "20,20,2,64", "3,3,32,64"),
            "window={size=20x20 pad=1_1x1_1}, dim_labels=b01f_01io->01bf",
            2 * 400 * 9 * 32 * 64,
        ),
        # Its gradient with stride 2: every input meets every tap, the zeros between them do not count.
        (
            ("2,10,10,64", "3,3,64,32", "2,20,20,32"),
            "window={size=3x3 pad=1_2x1_2 lhs_dilate=2x2}, dim_labels=b01f_01io->b01f",
            2 * 29 * 29 * 64 * 32,
        ),
        # Eight products of 16 x 40 and 40 x 16 as one convolution along the batch.
        (
            ("8,16,40", "8,40,16", "8,16,16"),
            "window={size=8 stride=7 lhs_dilate=8}, dim_labels=0bf_0io->0bf",
            8 * 16 * 40 * 16,
        ),
    ],
)
def test_convolutions(shapes, attributes, macs):
    left, kernel, output = (f"f32[{shape}]" for shape in shapes)
    program = read_program(
        entry(
            f"%l = {left}{{0}} parameter(0)",
            f"%k = {kernel}{{0}} parameter(1)",
            f"%o = {output}{{0}} convolution(%l, %k), {attributes}",
        )
    )
    assert program.flops == 2 * macs


@pytest.mark.parametrize(
    ("shape", "whole", "outside"),
    [
        ("s4[3,16]{1,0}", 24, 24),
        ("(bf16[8]{0:S(1)}, pred[8]{0}, u32[])", 28, 12),
        ("f64[2]{0}", 16, 16),
        ("token[]", 0, 0),
    ],
)
def test_bytes_of_shapes(shape, whole, outside):
    assert (size(shape), size(shape, hbm_only=True)) == (whole, outside)


def test_something_else_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        read_program("module @jit_f { }")


def test_kernels():
    """Attention's work is known by its operands, padding and all; another kernel is named."""
    kernel = (
        "%{name}.1 = (f32[8,512,128]{{2,1,0}}, bf16[2,8,512,128]{{3,2,1,0}}) custom-call(%i, %j, %q, %k, %k, %s), "
        'custom_call_target="tpu_custom_call", frontend_attributes={{kernel_metadata={{\n}}}}, backend_config={{}}'
    )
    operands = (
        "%i = s8[1,1,1]{2,1,0} parameter(0)",
        "%j = s8[1,1,1]{2,1,0} parameter(1)",
        "%q = bf16[2,8,512,128]{3,2,1,0} parameter(2)",
        "%k = bf16[2,8,1024,128]{3,2,1,0} parameter(3)",
        "%s = s32[2,512,128]{2,1,0} parameter(4)",
    )
    names = ("splash_mha_fwd_residuals", "splash_mha_dq", "splash_mha_dkv", "other")
    program = read_program(entry(*operands, *(kernel.format(name=name) for name in names)))
    flops = (2 + 3 + 4) * 2 * 2 * 8 * 512 * 1024 * 128
    assert program.flops == flops
    assert program.unknown_kernels == ["other.1"]
    loop, lines = three_times(*operands[2:4], *(kernel.format(name=name) for name in names[:3]))
    assert read_program(loop + entry(*lines)).flops == 3 * flops
