# SPDX-License-Identifier: Apache-2.0
"""Bytes through main memory, of small programs as the TPU's compiler prints them."""

import pytest

from ospec_jax.decoding import hlo, traffic

KB = 1024
# bf16[256,128] is 64 kB; `S(1)` is on the chip.
WEIGHT = "bf16[256,128]{1,0:T(8,128)(2,1)}"
FETCHED = "bf16[256,128]{1,0:T(8,128)(2,1)S(1)}"
HALF = "bf16[128,128]{1,0:T(8,128)(2,1)S(1)}"
FLAG = "u32[]{:S(2)}"
NAME = 'metadata={op_name="weights"}'


def account(body: str, before: str = "") -> traffic.Traffic:
    lines = "\n".join(f"  {line.strip()}" for line in body.strip().splitlines())
    head = "ENTRY %main (w: bf16[256,128]) -> f32[] {"
    return traffic.account(f"HloModule m\n\n{before}\n{head}\n{lines}\n}}\n")


def test_an_array_counts_where_it_lies_in_memory():
    found = account(f"""
        %w = {WEIGHT} parameter(0), {NAME}
        %a = {FETCHED} negate(%w)
        %b = {FETCHED} negate(%a)
        ROOT %c = {WEIGHT} add(%a, %b)
    """)
    assert found.arguments == {"weights": 64 * KB}
    assert found.by_argument() == {"weights": (64 * KB, 0), "": (0, 64 * KB)}
    assert found.total == 128 * KB


def test_a_weight_that_is_fetched_in_slices_counts_once():
    start = lambda name, rows: (
        f"%{name} = (({WEIGHT}), {HALF}, {FLAG}) slice-start(%w), slice={{{rows}}}"
    )
    found = account(f"""
        %w = {WEIGHT} parameter(0), {NAME}
        {start("s0", "[0:128], [0:128]")}
        {start("s1", "[128:256], [0:128]")}
        %d0 = {HALF} slice-done(%s0)
        %d1 = {HALF} slice-done(%s1)
        %j = {FETCHED} custom-call(%d0, %d1), custom_call_target="ConcatBitcast"
        ROOT %y = {FETCHED} negate(%j)
    """)
    assert found.total == 64 * KB


def test_what_is_fetched_for_the_next_run_is_not_fetched_twice():
    copy = f"({FETCHED}, {WEIGHT}, {FLAG}) copy-start(%w)"
    found = account(f"""
        %w = {WEIGHT} parameter(0), {NAME}
        %c = {copy}, cross_program_prefetch_index=0
        %d = {FETCHED} copy-done(%c)
        %e = {copy}
        ROOT %y = {FETCHED} negate(%d)
    """)
    assert found.total == 64 * KB


def test_what_is_copied_back_is_written():
    found = account(f"""
        %w = {WEIGHT} parameter(0), {NAME}
        %c = ({FETCHED}, {WEIGHT}, {FLAG}) copy-start(%w)
        %d = {FETCHED} copy-done(%c)
        %b = ({WEIGHT}, {FETCHED}, {FLAG}) copy-start(%d)
        ROOT %y = {WEIGHT} copy-done(%b)
    """)
    assert found.by_argument() == {"weights": (64 * KB, 64 * KB)}


LOOP = f"""%body (p: (s32[], bf16[256,128])) -> (s32[], bf16[256,128]) {{
  %p = (s32[], {WEIGHT}) parameter(0)
  %i = s32[]{{:S(6)}} get-tuple-element(%p), index=0
  %buffer = {WEIGHT} get-tuple-element(%p), index=1
  %row = bf16[8,128]{{1,0:T(8,128)(2,1)S(1)}} iota(), iota_dimension=0
  %zero = s32[]{{:S(6)}} constant(0)
  %new = {WEIGHT} dynamic-update-slice(%buffer, %row, %i, %zero)
  ROOT %t = (s32[], {WEIGHT}) tuple(%i, %new)
}}

%condition (q: (s32[], bf16[256,128])) -> pred[] {{
  %q = (s32[], {WEIGHT}) parameter(0)
  %n = s32[]{{:S(6)}} get-tuple-element(%q), index=0
  %limit = s32[]{{:S(6)}} constant(9)
  ROOT %less = pred[]{{:S(6)}} compare(%n, %limit), direction=LT
}}
"""


def test_a_loop_counts_as_often_as_it_turns():
    body = f"""
        %w = {WEIGHT} parameter(0), {NAME}
        %first = s32[]{{:S(6)}} constant(2)
        %t = (s32[], {WEIGHT}) tuple(%first, %w)
        ROOT %l = (s32[], {WEIGHT}) while(%t), condition=%condition, body=%body
    """
    found = account(body, LOOP)
    # Seven turns, each of which writes eight whole rows in place.
    assert found.by_argument() == {"weights": (0, 7 * 2 * KB)}
    assert (found.num_loops, found.num_unknown_loops) == (1, 0)
    unknown = account(body, LOOP.replace("direction=LT", "direction=NE"))
    assert unknown.total == 2 * KB
    assert (unknown.num_loops, unknown.num_unknown_loops) == (1, 1)


def test_a_column_takes_whole_tiles_which_are_read_first():
    column = "bf16[1,2,128,1]{3,2,1,0:T(8,128)(2,1)S(1)}"
    keys = "bf16[8,2,128,2048]{3,2,1,0:T(8,128)(2,1)}"
    found = account(f"""
        %k = {keys} parameter(0), {NAME}
        %new = {column} iota(), iota_dimension=1
        %z = s32[]{{:S(6)}} constant(0)
        ROOT %y = {keys} dynamic-update-slice(%k, %new, %z, %z, %z, %z)
    """)
    assert found.by_argument() == {"weights": (64 * KB, 64 * KB)}


FUSED = f"""%view (v: bf16[256,128]) -> bf16[256,128] {{
  %v = {WEIGHT} parameter(0)
  ROOT %b = {WEIGHT} bitcast(%v)
}}

%product (x: bf16[256,128], at: s32[]) -> bf16[8,128] {{
  %x = {WEIGHT} parameter(0)
  %at = s32[]{{:S(6)}} parameter(1)
  %seen = {WEIGHT} fusion(%x), kind=kLoop, calls=%view
  %some = bf16[8,128]{{1,0:T(8,128)(2,1)}} dynamic-slice(%seen, %at, %at)
  ROOT %y = bf16[8,128]{{1,0:T(8,128)(2,1)}} negate(%some)
}}

%update (old: bf16[256,128], row: bf16[8,128], at: s32[]) -> bf16[256,128] {{
  %old = {WEIGHT} parameter(0)
  %row = bf16[8,128]{{1,0:T(8,128)(2,1)}} parameter(1)
  %at = s32[]{{:S(6)}} parameter(2)
  ROOT %u = {WEIGHT} dynamic-update-slice(%old, %row, %at, %at)
}}
"""


@pytest.mark.parametrize("is_sliced", [True, False])
def test_of_a_fusion_only_slices_count_that_it_reads(is_sliced):
    before = FUSED
    if not is_sliced:
        before = FUSED.replace("dynamic-slice(%seen, %at, %at)", "reduce(%seen, %at)")
    found = account(
        f"""
        %w = {WEIGHT} parameter(0), {NAME}
        %z = s32[]{{:S(6)}} constant(0)
        %y = bf16[8,128]{{1,0:T(8,128)(2,1)S(1)}} fusion(%w, %z), calls=%product
        ROOT %u = {WEIGHT} fusion(%w, %y, %z), calls=%update
        """,
        before,
    )
    assert found.by_argument() == {
        "weights": (2 * KB if is_sliced else 64 * KB, 2 * KB)
    }


def test_a_conditional_counts_as_its_dearest_branch():
    branch = lambda name, shape: (
        f"%{name} (p: bf16[256,128]) -> bf16[256,128] {{\n"
        f"  %p = {WEIGHT} parameter(0)\n  ROOT %y = {shape} negate(%p)\n}}\n"
    )
    found = account(
        f"""
        %w = {WEIGHT} parameter(0), {NAME}
        %i = s32[]{{:S(6)}} constant(0)
        ROOT %c = {WEIGHT} conditional(%i, %w, %w), branch_computations={{%a, %b}}
        """,
        branch("a", FETCHED) + branch("b", WEIGHT),
    )
    assert found.total == 128 * KB


def test_a_collective_that_is_spread_over_fusions_counts_once():
    part = lambda name: (
        f"%{name} (p: bf16[256,128]) -> bf16[256,128] {{\n"
        f"  %p = {FETCHED} parameter(0)\n"
        f"  ROOT %g = {FETCHED} all-gather(%p), channel_id=7, dimensions={{0}}\n}}\n"
    )
    found = account(
        f"""
        %w = {WEIGHT} parameter(0), {NAME}
        %s = {FETCHED} all-reduce(%w), channel_id=3, to_apply=%add
        %t = {FETCHED} all-reduce(%s), channel_id=4, to_apply=%add
        %f = {FETCHED} fusion(%t), calls=%a
        ROOT %g = {FETCHED} fusion(%f), calls=%b
        """,
        part("a") + part("b"),
    )
    assert found.collectives == {
        "all-reduce": (2, 128 * KB),
        "all-gather": (1, 64 * KB),
    }


def test_tuples_comments_and_estimates_are_read():
    computations, entry = hlo.parse(
        "ENTRY %main (a: f32[8]) -> (f32[8], f32[8]) {\n"
        "  %a = f32[8]{0:T(128)} parameter(0)\n"
        "  ROOT %y = (f32[8]{0:T(128)}, /*index=1*/f32[8]{0:T(128)S(1)}) "
        'custom-call(%a, /*index=1*/%a), custom_call_target="x(y)", '
        'backend_config={"estimated_cycles":"1840"}\n}\n'
    )
    line = computations[entry]["y"]
    assert line.operands == ("a", "a")
    assert [array.moved for array in line.arrays] == [512, 0]
    assert line.cycles == 1840


def test_text_that_is_no_compiled_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        traffic.account("module @jit_f {}")
