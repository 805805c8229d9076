"""What is read out of machine code, on lines that were written for it."""

from types import SimpleNamespace

import pytest

from common import machine_code

SASS = """
 /*0000*/ LDG.E.64 R2, desc[UR4][R2.64] ;
 /*0010*/ @!P0 LDG.E.128 R8, desc[UR4][R2.64] ;
 /*0020*/ @!P0 LDG.E.128 R12, desc[UR4][R4.64] ;
 /*0030*/ BAR.SYNC.DEFER_BLOCKING 0x0 ;
 /*0040*/ FMUL R20, R0, R13 ;
 /*0050*/ @!P1 LDG.E.128 R8, desc[UR4][R2.64+0x800] ;
 /*0060*/ @!P0 STG.E.128 desc[UR4][R4.64], R20 ;
 /*0070*/ @!P1 STG.E.128 desc[UR4][R6.64], R8 ;
 /*0080*/ MEMBAR.ALL.GPU ;
 /*0090*/ CCTL.IVALL ;
"""
AMDGCN = """
\tglobal_load_dwordx2 v[0:1], v2, s[0:1]
\ts_waitcnt vmcnt(0)
\tglobal_load_dwordx4 v[4:7], v2, s[2:3]
\tglobal_load_dwordx4 v[8:11], v2, s[4:5]
\ts_waitcnt vmcnt(1)
\tglobal_store_dwordx4 v2, v[4:7], s[2:3]
\tglobal_load_dwordx4 v[4:7], v2, s[2:3] offset:2048
\ts_waitcnt vmcnt(0)
\tbuffer_wbl2 sc1
"""


def compiled(shared=0):
    """As much as is looked at of a compiled kernel."""
    return SimpleNamespace(metadata=SimpleNamespace(shared=shared), asm={"amdgcn": AMDGCN})


def test_waits_are_where_something_loaded_is_first_used():
    assert list(machine_code._waits_of_sass(SASS)) == [32, 16]
    assert list(machine_code._waits_of_amdgcn(AMDGCN)) == [32, 16]


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "blocks"),
    [(32, 256, 0, 8), (33, 256, 0, 6), (48, 128, 0, 10), (255, 256, 0, 1), (16, 32, 0, 32),
     (32, 128, 100 << 10, 2)],
)  # fmt: skip
def test_resident_blocks(registers, threads, shared, blocks):
    """By registers, which come in eights; by threads, by blocks, by shared memory."""
    found = machine_code.flight(compiled(shared), "cuda:90", registers, threads, 0, False)
    assert (found.blocks, found.bytes) == (blocks, None)
    assert found.occupancy == blocks * threads / 2048
    assert str(found) == f"{blocks} blocks ({found.occupancy:.0%})"


def test_only_the_first_look_at_a_chunk_counts():
    found = machine_code.flight(compiled(), "hip:gfx942", 64, 128, 32, True)
    assert (found.bytes, found.fences) == (32, 1)
    needed = 4.3e12 * 800e-9 / 304
    assert found.headroom == pytest.approx(32 * 128 * found.blocks / needed)
    both = machine_code.flight(compiled(), "hip:gfx942", 64, 128, 48, True)
    assert both.bytes == 24
