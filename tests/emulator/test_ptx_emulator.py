"""The emulator on PTX written by hand: what instructions do, and what it refuses."""

import struct
import textwrap

import numpy as np
import pytest
import torch

from ptx import UnknownInstruction
from ptx_emulator import EmulatorError

HEAD = """
.visible .entry test(
\t.param .u64 .ptr .global .align 1 test_param_0,
\t.param .u64 .ptr .global .align 1 test_param_1
)
.reqntid 64
{
\tld.param.b64 %rd1, [test_param_0];
\tld.param.b64 %rd2, [test_param_1];
\tmov.u32 %r1, %tid.x;
\tmov.u32 %r2, %ctaid.x;
"""


def run(emulator, body, source, result, grid=(1,), threads=64, shared=1024):
    """``body`` has the tensors' addresses in %rd1 and %rd2, thread and block in %r1 and %r2."""
    text = HEAD + textwrap.dedent(body).replace("    ", "\t") + "\n\tret;\n}\n"
    program = emulator.load(text, "test")
    spans = [(x.data_ptr(), x.data_ptr() + x.untyped_storage().nbytes()) for x in (source, result)]
    emulator.allow([span for span in dict.fromkeys(spans) if span[0]])
    arguments = [struct.pack("Q", x.data_ptr()) for x in (source, result)]
    emulator.run(program, grid, threads, shared, arguments)
    return result


@pytest.fixture
def emulator(machine):
    machine.emulator.configure(seed=1)
    return machine.emulator


def element(kind, bytes_):
    """Loads element ``tid`` to %x, and gives what stores %y there."""
    load = f"""
    mul.wide.u32 %rd3, %r1, {bytes_[0]};
    add.s64 %rd4, %rd1, %rd3;
    ld.global.{kind[0]} %x, [%rd4];
    """
    store = f"""
    mul.wide.u32 %rd5, %r1, {bytes_[1]};
    add.s64 %rd6, %rd2, %rd5;
    st.global.{kind[1]} [%rd6], %y;
    """
    return textwrap.dedent(load), textwrap.dedent(store)


@pytest.mark.parametrize(
    ("name", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16)]
)  # fmt: skip
def test_numbers_of_16_bits(emulator, name, dtype):
    """To float32 and back, over all of them and what lies between: as torch converts."""
    load, store = element(("b16", "b32"), (2, 4))
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    for part in every.split(1024):
        wide = run(emulator, load + f"cvt.f32.{name} %y, %x;" + store, part,
                   torch.zeros(1024), threads=1024)  # fmt: skip
        assert torch.equal(wide.nan_to_num(nan=7.0), part.float().nan_to_num(nan=7.0))
    load, store = element(("b32", "b16"), (4, 2))
    finite = every.float()[every.isfinite()]
    between = (finite * (1 + 2.0**-9)).nan_to_num() + finite.abs() * 2.0**-12
    for part in torch.cat([between, torch.tensor([65519.9, 65520.0, 1e39, 3e38])]).split(1024):
        n = len(part) // 32 * 32 or 32
        part = torch.cat([part, torch.zeros(32)])[:n]
        narrow = run(emulator, load + f"cvt.rn.{name}.f32 %y, %x;" + store, part,
                     torch.zeros(n, dtype=dtype), threads=n)  # fmt: skip
        assert torch.equal(narrow, part.to(dtype))


OPERATIONS = {
    "add.f32 %y, %x, 0f3F800001": lambda x: x + np.float32(1 + 2.0**-23),
    "mul.f32 %y, %x, %x": lambda x: x * x,
    "fma.rn.f32 %y, %x, %x, 0fBF800000": lambda x: x.astype(np.float64) ** 2 - 1,
    "sqrt.rn.f32 %y, %x": np.sqrt,
    "div.rn.f32 %y, %x, 0f40400000": lambda x: x / np.float32(3),
    "max.f32 %y, %x, 0f3F800000": lambda x: np.fmax(x, np.float32(1)),
    "neg.f32 %y, %x": lambda x: -x,
    "abs.f32 %y, %x": np.abs,
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_float32(emulator, operation):
    load, store = element(("b32", "b32"), (4, 4))
    x = np.random.default_rng(0).standard_normal(64).astype(np.float32)
    x[:4] = 0.0, np.inf, np.nan, -1e-42
    ours = run(emulator, load + operation + ";" + store, torch.from_numpy(x), torch.zeros(64))
    with np.errstate(invalid="ignore"):
        expected = OPERATIONS[operation](x).astype(np.float32)
    np.testing.assert_array_equal(ours.numpy(), expected)


INTEGERS = {
    "add.s32 %y, %x, 5": lambda x: x + 5,
    "mul.lo.s32 %y, %x, 1640531527": lambda x: x * 1640531527,
    "mul.hi.u32 %y, %x, -1640531527": lambda x: (x % 2**32) * (2**32 - 1640531527) >> 32,
    "mul.hi.s32 %y, %x, 1640531527": lambda x: x * 1640531527 >> 32,
    "shr.s32 %y, %x, 7": lambda x: x >> 7,
    "shr.u32 %y, %x, 7": lambda x: (x % 2**32) >> 7,
    "shl.b32 %y, %x, 33": lambda x: 0 * x,
    "not.b32 %y, %x": lambda x: ~x,
    "min.s32 %y, %x, 3": lambda x: np.minimum(x, 3),
    "rem.s32 %y, %x, 7": lambda x: np.fmod(x, 7),
    "bfe.u32 %y, %x, 5, 9": lambda x: x >> 5 & 0x1FF,
    "prmt.b32 %y, %x, 0, 0x3201": lambda x: (x & ~0xFFFF) | (x & 0xFF) << 8 | (x >> 8 & 0xFF),
}


@pytest.mark.parametrize("operation", INTEGERS)
def test_integers(emulator, operation):
    load, store = element(("b32", "b32"), (4, 4))
    x = np.random.default_rng(0).integers(-(2**31), 2**31, 64, dtype=np.int64)
    source = torch.from_numpy(x.astype(np.int32))
    ours = run(emulator, load + operation + ";" + store, source, torch.zeros(64, dtype=torch.int32))
    objects = np.array([INTEGERS[operation](int(value)) for value in x], dtype=object) % 2**32
    np.testing.assert_array_equal(ours.numpy().view(np.uint32), objects.astype(np.uint32))


def test_lanes_that_part_and_meet_again(emulator):
    """A loop whose length depends on the thread: the sum of the numbers up to it."""
    _, store = element(("b32", "b32"), (4, 4))
    body = """
    mov.b32 %y, 0;
    mov.b32 %r3, %r1;
    $loop:
    setp.eq.s32 %p1, %r3, 0;
    @%p1 bra $end;
    add.s32 %y, %y, %r3;
    add.s32 %r3, %r3, -1;
    bra.uni $loop;
    $end:
    bar.sync 0;
    """
    empty = torch.zeros(64, dtype=torch.int32)
    ours = run(emulator, textwrap.dedent(body) + store, empty, empty)
    assert ours.tolist() == [n * (n + 1) // 2 for n in range(64)]


SHUFFLES = {
    "bfly.b32 %y, %x, 5, 31": lambda k: k ^ 5,
    "idx.b32 %y, %x, 3, 31": lambda k: k // 32 * 32 + 3,
    "up.b32 %y, %x, 2, 0": lambda k: k if k % 32 < 2 else k - 2,
    "down.b32 %y, %x, 2, 31": lambda k: k if k % 32 > 29 else k + 2,
    "down.b32 %y, %x, 2, 6175": lambda k: k if k % 8 > 5 else k + 2,  # segments of 8
}


@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_shuffles(emulator, shuffle):
    load, store = element(("b32", "b32"), (4, 4))
    body = load + f"shfl.sync.{shuffle}, -1;" + store
    numbers = torch.arange(64, dtype=torch.int32)
    ours = run(emulator, body, numbers, torch.zeros(64, dtype=torch.int32))
    assert ours.tolist() == [SHUFFLES[shuffle](k) for k in range(64)]


@pytest.mark.parametrize(
    ("operation", "exact"),
    [("add.s32", lambda warp: warp.sum()), ("max.s32", lambda warp: warp.max()),
     ("max.u32", lambda warp: -1 if (warp < 0).any() else warp.max())],
)  # fmt: skip
def test_reductions_of_a_warp(emulator, operation, exact):
    load, store = element(("b32", "b32"), (4, 4))
    body = load + f"redux.sync.{operation} %y, %x, -1;" + store
    numbers = torch.arange(64, dtype=torch.int32) * 7 % 40 - 1
    ours = run(emulator, body, numbers, torch.zeros(64, dtype=torch.int32))
    expected = [int(exact(warp)) for warp in numbers.split(32) for _ in warp]
    assert ours.tolist() == expected


def test_two_numbers_at_once(emulator):
    load, store = element(("b32", "b32"), (4, 4))
    body = load + "add.s16x2 %y, %x, -65537;" + store
    numbers = torch.tensor([0, 1, 65536, 65537, 2**31 - 1, -1, -(2**31), 5] * 8, dtype=torch.int32)
    ours = run(emulator, body, numbers, torch.zeros(64, dtype=torch.int32))
    halves = numbers.view(torch.int16) - 1
    halves[1::2] -= 1  # -65537 is -2 and -1
    assert ours.tolist() == halves.view(torch.int32).tolist()


THROUGH_SHARED = """
shl.b32 %r3, %r1, 2;
st.shared.b32 [%r3], %r1;
BARRIER
xor.b32 %r4, %r3, 128;
ld.shared.b32 %y, [%r4];
"""


def test_a_barrier_orders_warps(emulator):
    """Each thread takes what one of the other warp has left; without the barrier, in some order,
    something that nobody has left."""
    _, store = element(("b32", "b32"), (4, 4))
    right = [k ^ 32 for k in range(64)]

    def exchanged(barrier, seed):
        emulator.configure(seed)
        empty = torch.zeros(64, dtype=torch.int32)
        return run(emulator, THROUGH_SHARED.replace("BARRIER", barrier) + store, empty, empty)

    assert all(exchanged("bar.sync 0;", seed).tolist() == right for seed in range(8))
    assert any(exchanged("", seed).tolist() != right for seed in range(8))


def test_atomics_count_every_thread_of_every_block(emulator):
    body = "atom.global.gpu.acq_rel.add.u32 %r3, [%rd2 + 4], 3;"
    counter = torch.zeros(2, dtype=torch.int32)
    assert run(emulator, body, counter, counter, grid=(7,)).tolist() == [0, 7 * 64 * 3]
    body = "red.global.gpu.relaxed.add.u64 [ %rd2 + 8 ], %rd9;"
    body = "mov.b64 %rd9, 4294967297;" + body
    counter = torch.zeros(2, dtype=torch.int64)
    assert run(emulator, body, counter, counter, grid=(7,)).tolist() == [0, 7 * 64 * (2**32 + 1)]


WRONG = {
    "ld.global.v4.b32 {%a, %b, %c, %d}, [%rd1 + 4];": "misaligned 16-byte load",
    "st.global.b64 [%rd2 + 4], %rd1;": "misaligned 8-byte store",
    "ld.global.b32 %a, [%rd1 + 256];": "4-byte load out of bounds",
    "ld.global.b32 %a, [%rd1 + -4];": "4-byte load out of bounds",
    "ld.global.v2.b32 {%a, %b}, [%rd1 + 256];": "8-byte load out of bounds",
    "st.shared.b32 [%r1 + 1024], %r1;": "shared memory has 1024 bytes",
    "st.shared.b32 [%r1 + 3], %r1;": "misaligned access to shared memory",
    "setp.eq.s32 %p1, %r1, 3;\n@%p1 bra $L1;\nbar.sync 0;\n$L1:": "barrier in a diverged warp",
    "setp.lt.s32 %p1, %r1, 32;\n@%p1 bra $L1;\nbar.sync 0;\n$L1:": "not reached by all warps",
}


@pytest.mark.parametrize("body", WRONG)
def test_what_a_gpu_must_not_do(emulator, body):
    memory = torch.zeros(64, dtype=torch.int32)
    assert memory.data_ptr() % 16 == 0
    with pytest.raises(EmulatorError, match=WRONG[body]):
        run(emulator, body, memory, memory)


@pytest.mark.parametrize(
    "statement",
    ["add.cc.u32 %a, %b, %c", "wgmma.fence.sync.aligned", "atom.global.cas.b32 %a, [%rd1], %b, %c",
     "mad.hi.s32 %a, %b, %c, %d", "bar.sync 1, 64", "set.eq.u32.u32 %a, %b, %c",
     "sub.s16x2 %a, %b, %c", "redux.sync.min.s32 %a, %b, -1", "red.global.max.u32 [%rd1], %b"],
)  # fmt: skip
def test_no_instruction_is_run_wrongly(emulator, statement):
    memory = torch.zeros(64, dtype=torch.int32)
    with pytest.raises(UnknownInstruction, match=statement.split()[0]):
        run(emulator, statement + ";", memory, memory)
