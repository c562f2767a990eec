"""The PTX emulator itself: what instructions compute, and that it refuses what real hardware forbids or hangs on."""

import numpy as np
import pytest

from emulator import tensor_cores
from emulator.arithmetic import bf16_to_f32, f32_to_bf16
from emulator.errors import EmulatorError
from emulator.machine import execute
from emulator.memory import GlobalMemory, TensorMap, swizzle
from emulator.parse import Program, split_operands

HEAD = """
.visible .entry k(.param .u64 k_param_0, .param .align 64 .b8 k_param_1[128])
.reqntid 32
{
    .reg .pred %p<9>; .reg .b16 %h<9>; .reg .b32 %r<99>; .reg .b64 %rd<99>;
    ld.param.b64 %rd0, [k_param_0];
    mov.b32 %r1, k_param_1;
    cvt.u64.u32 %rd1, %r1;
    cvta.param.u64 %rd1, %rd1;
    mov.u32 %r0, %tid.x;
    mul.wide.u32 %rd2, %r0, 4;
    add.s64 %rd3, %rd0, %rd2;
"""
TAIL = """
    st.global.b32 [%rd3], %r9;
    ret;
}
"""


def execute_body(body, *, tensor=None, threads=32, cluster=1, early=True, tail=TAIL, box=(8, 64)):
    """Runs `body` between HEAD and TAIL, which stores %r9 of each thread -> those uint32."""
    out = np.zeros(threads, np.uint32)
    memory = GlobalMemory()
    tensor = np.zeros((8, 64), np.int16) if tensor is None else tensor
    ptx = HEAD.replace("reqntid 32", f"reqntid {threads}") + body + tail
    parameters = [memory.add(out), TensorMap(tensor, box, 128)]
    execute(ptx, parameters, memory, (cluster,), early=early, cluster=cluster)
    return out


LANES = np.arange(32, dtype=np.uint32)
# body computing %r9 from %r0 = lane, and what it must be
NAN = "mov.b32 %r1, 0x7FC00000; mov.b32 %r2, 0x3F800000; "  # and 1.0
COMPUTED = {
    "add": ("add.s32 %r9, %r0, -1;", LANES - np.uint32(1)),
    "literal": ("mov.b32 %r9, 0f3F800000;", np.full(32, 0x3F800000, np.uint32)),
    "signed-shift": ("sub.s32 %r1, %r0, 16; shr.s32 %r9, %r1, 2;", (LANES.astype(np.int32) - 16 >> 2).view(np.uint32)),
    "shift-out": ("shl.b32 %r9, %r0, 32;", np.zeros(32, np.uint32)),
    "divide": (
        "sub.s32 %r1, %r0, 16; div.s32 %r9, %r1, 3;",
        np.trunc((LANES.astype(int) - 16) / 3).astype(np.int32).view(np.uint32),
    ),
    "remainder": ("rem.u32 %r9, %r0, 5;", LANES % 5),
    "bit-field": ("bfe.u32 %r9, %r0, 1, 2;", LANES >> 1 & 3),
    "signed-bit-field": (
        "bfe.s32 %r9, %r0, 1, 2;",
        np.where((LANES >> 1 & 3) > 1, (LANES >> 1 & 3) - 4, LANES >> 1 & 3),
    ),
    "majority": (
        "mov.b32 %r1, 12; mov.b32 %r2, 10; lop3.b32 %r9, %r0, %r1, %r2, 0xE8;",
        (LANES & 12) | (LANES & 10) | (12 & 10),
    ),
    "permute-bytes": ("mov.b32 %r1, 0x44332211; prmt.b32 %r9, %r1, %r0, 0x0123;", np.full(32, 0x11223344, np.uint32)),
    "permute-sign": ("mov.b32 %r1, 0x80; prmt.b32 %r9, %r1, 0, 0x8888;", np.full(32, 0xFFFFFFFF, np.uint32)),
    "multiply-high": ("mov.b32 %r1, 0x80000000; mul.hi.u32 %r9, %r0, %r1;", LANES >> 1),
    "multiply-add": ("mad.lo.s32 %r9, %r0, %r0, 7;", LANES * LANES + 7),
    "select": ("setp.lt.u32 %p1, %r0, 9; selp.b32 %r9, 1, 2, %p1;", np.where(LANES < 9, 1, 2).astype(np.uint32)),
    "predicated": ("mov.b32 %r9, 5; setp.lt.u32 %p1, %r0, 9; @!%p1 mov.b32 %r9, 6;", np.where(LANES < 9, 5, 6)),
    "pack-and-split": ("mov.b64 %rd9, {%r0, 7}; mov.b64 {%r1, %r2}, %rd9; add.u32 %r9, %r1, %r2;", LANES + 7),
    "shuffle": ("shfl.sync.idx.b32 %r9, %r0, 3, 31, -1;", np.full(32, 3, np.uint32)),
    "butterfly": ("shfl.sync.bfly.b32 %r9, %r0, 1, 31, -1;", LANES ^ 1),
    "sum-of-a-warp": ("sub.s32 %r1, %r0, 16; redux.sync.add.s32 %r9, %r1, -1;", np.full(32, -16, np.int32).view("u4")),
    "count-bits": ("mul.lo.u32 %r1, %r0, 3; popc.b32 %r9, %r1;", np.array([bin(3 * i).count("1") for i in range(32)])),
    "to-float": ("cvt.rn.f32.u32 %r9, %r0;", LANES.astype(np.float32).view(np.uint32)),
    "maximum-with-nan": (
        "mov.b32 %r1, 0x7FC00000; mov.b32 %r2, 0; max.NaN.f32 %r1, %r1, %r2; mov.b32 %r9, %r1;",
        np.full(32, 0x7FFFFFFF),
    ),
    "elect": ("elect.sync _|%p1, -1; selp.b32 %r9, 1, 0, %p1;", (LANES == 0).astype(np.uint32)),
    "scopes": ("{ .reg .b32 t; mov.b32 t, 1; { .reg .b32 t; mov.b32 t, 2; } mov.b32 %r9, t; }", np.ones(32, np.uint32)),
    "loop": (
        "mov.b32 %r9, 0; L: add.u32 %r9, %r9, 2; setp.lt.u32 %p1, %r9, 10; @%p1 bra L;",
        np.full(32, 10, np.uint32),
    ),
    "shared": (
        "mov.b32 %r1, global_smem; mad.lo.s32 %r2, %r0, 4, %r1; st.shared.b32 [%r2], %r0; xor.b32 %r3, %r2, 4;"
        "ld.shared.b32 %r9, [%r3];",
        LANES ^ 1,
    ),
    "unwritten-shared-is-nan": ("mov.b32 %r1, global_smem; ld.shared.b32 %r9, [%r1+64];", np.full(32, 0xFFFFFFFF)),
    "minimum-without-nan": (NAN + "min.f32 %r9, %r1, %r2;", np.full(32, 0x3F800000)),
    "less-or-nan": (NAN + "setp.ltu.f32 %p1, %r1, %r2; selp.b32 %r9, 1, 2, %p1;", np.ones(32)),
    "less-without-nan": (NAN + "setp.lt.f32 %p1, %r1, %r2; selp.b32 %r9, 1, 2, %p1;", np.full(32, 2)),
    "higher": ("setp.hi.u32 %p1, %r0, 9; selp.b32 %r9, 1, 2, %p1;", np.where(LANES > 9, 1, 2)),
    "sign-of-the-first": (
        "mov.b32 %r1, 0xBF800000; mov.b32 %r2, 0x40000000; copysign.f32 %r9, %r1, %r2;",
        np.full(32, 0xC0000000),
    ),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_instructions_compute(name):
    body, expected = COMPUTED[name]
    np.testing.assert_array_equal(execute_body(body), np.asarray(expected).astype(np.uint32))


BARRIER = "mov.b32 %r1, global_smem; setp.eq.u32 %p1, %r0, 0; @%p1 mbarrier.init.shared::cta.b64 [%r1], 1;"
EXPECT = "@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], 1024;"
LOAD = (
    f"add.u32 %r2, %r1, 1024; {EXPECT}"
    "@%p1 cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [%r2], [%rd1, {0, 0}], [%r1];"
)
WAIT = "LW: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r1], 0; @!%p2 bra LW;"
READ = "mad.lo.s32 %r3, %r0, 4, %r2; ld.shared.b32 %r9, [%r3];"


@pytest.mark.parametrize("early", [True, False], ids=["early", "late"])
def test_tma_brings_a_box(early):
    tensor = np.arange(8 * 64, dtype=np.int16).reshape(8, 64)
    out = execute_body(BARRIER + LOAD + WAIT + READ, tensor=tensor, early=early)
    np.testing.assert_array_equal(out, tensor.reshape(-1).view(np.uint32)[:32])  # the first row is not swizzled


def test_a_missing_wait_shows_when_copies_are_late():
    out = execute_body(BARRIER + LOAD + READ + WAIT, early=False)
    assert (out == 0xFFFFFFFF).all()


REFUSED = {
    "out-of-bounds": ("st.global.b32 [%rd3+4], %r0;", "out of bounds"),
    "map-without-its-generic-address": (BARRIER + "mov.b64 %rd1, k_param_1;" + LOAD, "no tensor map"),
    "below-shared-memory": ("mul.lo.u32 %r1, %r0, 4; ld.shared.b32 %r9, [%r1];", "shared memory has no bytes -1024"),
    "beyond-shared-memory": ("mov.b32 %r1, global_smem; st.shared.b32 [%r1+232448], %r0;", "no bytes 232448 to 232451"),
    "misaligned": ("st.global.b32 [%rd3+2], %r0;", "misaligned"),
    "divergent-branch": ("setp.lt.u32 %p1, %r0, 9; @%p1 bra L; L:", "divergent"),
    "bf16-sum": ("add.bf16 %h1, %h2, %h3;", "arithmetic on bf16"),
    "bf16-product": ("mul.bf16x2 %r1, %r0, %r0;", "arithmetic on bf16"),
    "sum-with-nan": ("add.NaN.f32 %r1, %r0, %r0;", "has no form .NaN"),
    "unknown-instruction": ("frobnicate.b32 %r1, %r0;", "unknown instruction"),
    "never-completes": (BARRIER + WAIT, "deadlock"),
    "wrong-byte-count": (BARRIER + LOAD.replace("[%r1], 1024", "[%r1], 1040") + WAIT, "deadlock"),
    "no-barrier-there": (WAIT.replace("[%r1]", "[%r0]"), "no mbarrier"),
    "over-arrival": (BARRIER + 2 * EXPECT, "more arrivals"),
    "load-in-flight-at-exit": (BARRIER + LOAD, "no mbarrier|in flight"),
    "tma-alignment": (BARRIER + LOAD.replace("%r1, 1024;", "%r1, 64;", 1), "aligned to 128"),
    "unfenced-store": (
        "mov.b32 %r1, global_smem; mad.lo.s32 %r2, %r0, 4, %r1; st.shared.b32 [%r2], %r0; setp.eq.u32 %p1, %r0, 0;"
        "@%p1 cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd1, {0, 0}], [%r1];",
        "without fence.proxy.async",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    body, message = REFUSED[name]
    with pytest.raises(EmulatorError, match=message):
        execute_body(body, early=name != "load-in-flight-at-exit")


def test_a_fenced_store_reaches_global_memory():
    tensor = np.zeros((8, 64), np.int16)
    store = REFUSED["unfenced-store"][0].replace("setp.eq", "fence.proxy.async.shared::cta; setp.eq")
    execute_body(store, tensor=tensor)
    np.testing.assert_array_equal(tensor.reshape(-1).view(np.uint32)[:32], LANES)


CLUSTER_SYNC = "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;"
ARRIVE_AT_PEER = (
    "mov.u32 %r4, %cluster_ctarank; xor.b32 %r4, %r4, 1; mapa.shared::cluster.u32 %r5, %r1, %r4;"
    "@%p1 mbarrier.arrive.shared::cluster.b64 _, [%r5];"
)
RANK = "mov.u32 %r9, %cluster_ctarank;"


def test_blocks_of_a_cluster_meet():
    out = execute_body(BARRIER + CLUSTER_SYNC + ARRIVE_AT_PEER + WAIT + RANK, cluster=2)
    assert set(out) <= {0, 1}


def test_multicast_reaches_both_blocks():
    tensor = np.arange(8 * 64, dtype=np.int16).reshape(8, 64)
    both = LOAD.replace("_tx::bytes [", "_tx::bytes.multicast::cluster [").replace("[%r1];", "[%r1], %h1;", 1)
    only_first = "mov.u32 %r4, %cluster_ctarank; setp.eq.u32 %p3, %r4, 0; and.pred %p4, %p1, %p3; mov.b16 %h1, 3;"
    both = both.replace("@%p1 cp", "@%p4 cp")
    out = execute_body(BARRIER + CLUSTER_SYNC + only_first + both + WAIT + READ, tensor=tensor, cluster=2)
    np.testing.assert_array_equal(out, tensor.reshape(-1).view(np.uint32)[:32])


def test_a_block_is_not_touched_before_it_starts():
    with pytest.raises(EmulatorError, match="before a cluster barrier"):
        execute_body(BARRIER + ARRIVE_AT_PEER + WAIT, cluster=2)


def test_a_block_is_not_touched_after_its_exit():
    first_leaves = RANK + "setp.eq.u32 %p3, %r9, 0; @%p3 bra END;"
    body = BARRIER + CLUSTER_SYNC + first_leaves + LOAD + WAIT + ARRIVE_AT_PEER + "END:"
    with pytest.raises(EmulatorError, match="after its exit"):
        execute_body(body, cluster=2, early=False)


def test_uninitialised_registers_hold_garbage():
    assert (execute_body("mov.b32 %r9, %r50;") != 0).all()


def test_operands_are_split_outside_brackets():
    assert split_operands("{a, b}, [m, {x, y}], 3") == ("{a, b}", "[m, {x, y}]", "3")


def test_program_of_one_entry():
    program = Program(HEAD + TAIL)
    assert program.name == "k"
    assert program.threads == 32
    assert program.parameters == [("k_param_0", "u64"), ("k_param_1", "map")]


def test_swizzle_moves_sixteen_byte_chunks_by_the_row():
    rows, columns = np.divmod(np.arange(1024), 128)
    np.testing.assert_array_equal(swizzle(np.arange(1024), 128), 128 * rows + (columns ^ 16 * rows))


def test_tensor_map_fills_with_zeros_and_clips():
    tensor = np.arange(1, 3 * 64 + 1, dtype=np.int16).reshape(3, 64)
    box = TensorMap(tensor, (4, 64), 128)
    read = box.read([-32, 2]).view(np.int16).reshape(4, 64)
    np.testing.assert_array_equal(read[0], np.r_[np.zeros(32, np.int16), tensor[2, :32]])
    assert not read[1:].any()
    box.write([32, 2], np.full(512, 0xFF, np.uint8))
    assert (tensor[2, 32:] == -1).all()
    assert (tensor[:2] > 0).all()
    with pytest.raises(EmulatorError, match="256 elements a side"):
        TensorMap(tensor, (4, 128), 128)


def test_bf16_rounds_to_nearest_even():
    bits = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x7FC00000], np.uint32)
    np.testing.assert_array_equal(f32_to_bf16(bits.view(np.float32)), [0x3F80, 0x3F82, 0x3F81, 0x7FFF])
    np.testing.assert_array_equal(bf16_to_f32(np.array([0x3F80], np.uint16)), [1.0])


def test_sparse_operand_expands_as_the_metadata_says():
    """The figure of the PTX ISA: groups 1 0 0 2, 0 3 4 0 ... by hand."""
    kept = np.arange(1, 17, dtype=np.float32)[None]
    words = np.array([[0x4 | 0x9 << 4 | 0xC << 8 | 0xE << 12, 0x4444]], np.uint16)
    dense = tensor_cores.expand(kept, words)[0]
    np.testing.assert_array_equal(dense[:16], [1, 2, 0, 0, 0, 3, 4, 0, 5, 0, 0, 6, 0, 0, 7, 8])
    np.testing.assert_array_equal(dense[16:20], [9, 10, 0, 0])
    with pytest.raises(EmulatorError, match="does not increase"):
        tensor_cores.expand(kept, np.array([[0x4440, 0x4444]], np.uint16))
