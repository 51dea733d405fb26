"""The reader of machine code counts what is written in small programs of known content."""

from longlive_jax.planning.ptx import Ptx
from longlive_jax.planning.sass import Product, Program
from longlive_jax.planning.warp import chain_cycles

HOPPER = """
   -:-:-:Y:02        /*0000*/                   S2R R0, SR_TID.X
   1:-:-:Y:05        /*0010*/               @P0 BRA `(.L_x_5)
   -:-:1:-:00        /*0020*/                   USETMAXREG.DEALLOC.CTAPOOL 0x18
   -:-:-:Y:01        /*0030*/                   MOV R11, 0x80
.L_x_1:
   -:-:2:Y:02        /*0040*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P2, [UR9], R9
   2:-:-:Y:05        /*0050*/              @!P2 BRA `(.L_x_7)
.L_x_2:
   -:3:-:Y:06        /*0060*/                   BAR.SYNC.DEFER_BLOCKING R7, 0x80
   -:3:-:Y:01        /*0070*/                   SYNCS.ARRIVE.TRANS64 RZ, [UR26+0x29020], R11
   -:3:-:Y:01        /*0080*/                   @UP3 UTMALDG.5D [UR8], [UR18]
   3:-:-:Y:05        /*0090*/               @P2 BRA `(.L_x_1)
   -:-:-:Y:05        /*00a0*/                   EXIT
.L_x_5:
   -:-:3:Y:02        /*00b0*/                   USETMAXREG.TRY_ALLOC.CTAPOOL UP1, 0xf0
   3:-:-:Y:05        /*00c0*/              @!UP1 BRA `(.L_x_5)
.L_x_3:
   -:-:-:Y:01        /*00d0*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR16], RZ, !UPT
   -:-:-:Y:03  /*00e0*/  HGMMA.64x128x16.F32.BF16 R88, R24, gdesc[UR16].tnspB, R88, gsb0
   -:-:-:Y:02        /*00f0*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0
   -:-:1:Y:04        /*0100*/                   MUFU.EX2 R1, R1
   -:-:1:Y:04        /*0110*/                   MUFU.EX2 R2, R2
   1:-:-:Y:02        /*0120*/                   F2FP.BF16.F32.PACK_AB R3, R1, R2
   -:1:-:Y:01        /*0130*/                   STS.128 [R4], R8
   -:-:-:Y:06        /*0140*/              @!P1 BRA `(.L_x_4)
{MASK}
.L_x_4:
   -:-:-:Y:05        /*0300*/               @P1 BRA `(.L_x_3)
   -:-:-:Y:05        /*0310*/                   EXIT
.L_x_7:
   -:2:3:Y:03        /*0320*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P2, [R10+URZ], R9
   3:-:-:Y:05        /*0330*/              @!P2 NANOSLEEP.SYNCS 0x989680
   3:-:-:Y:05        /*0340*/              @!P2 BRA `(.L_x_7)
   -:-:-:Y:05        /*0350*/                   BRA `(.L_x_2)
""".replace("{MASK}", "\n".join(["   -:-:-:Y:02  /*0150*/  FSEL R1, R1, R2, !P2"] * 20))
BLACKWELL = """
.L_x_1:
   -:-:-:Y:01        /*0000*/                   UMOV UR35, 0x8100490
   -:2:-:Y:01  /*0010*/  UTCHMMA gdesc[UR4], gdesc[UR8], tmem[UR15], tmem[UR34], idesc[UR35], !UPT
   -:2:-:Y:01  /*0020*/  UTCHMMA tmem[UR4], gdesc[UR8], tmem[UR15], tmem[UR34], idesc[UR35], UPT
   -:-:-:Y:05        /*0030*/               @P0 BRA `(.L_x_1)
"""
PTX = """
.maxntid 384, 1, 1
	mov.u32 	%r1, %tid.x;
	shr.u32 	%r3, %r1, 7;
	shfl.sync.idx.b32 	%r4, %r3, 0, 31, -1;
	setp.lt.s32 	%p22, %r4, 2;
	@%p22 bra 	$L__BB0_11;
	setmaxnreg.dec.sync.aligned.u32 24;
	setp.eq.b32 	%p23, %r90, 2;
	@%p23 bra 	$L__BB0_11;
$L__BB0_11:
	setp.gt.s32 	%p31, %r4, 1;
	@%p31 bra 	$L__BB0_18;
	setmaxnreg.inc.sync.aligned.u32 240;
$L__BB0_18:
	ret;
"""


def test_steps_of_a_hopper_kernel():
    entry, loader, compute = Program(HOPPER).roles
    assert (entry.registers, loader.registers, compute.registers) == (None, 24, 240)
    assert entry.step is None
    assert loader.step.tma_bytes == 128 * 128
    assert loader.step.barriers == 1
    assert len(loader.steps) == 1  # polls of barriers are no loops
    step = compute.step
    assert step.products == {
        Product((64, 128, 16), 16, a_shared=True): 1,
        Product((64, 128, 16), 16, a_shared=False): 1,
    }
    assert [p.shared_bytes for p in step.products] == [(64 + 128) * 16 * 2, 128 * 16 * 2]
    assert (step.exponentials, step.conversions, step.access_bytes) == (2, 1, 16 * 128)
    assert (len(step.path), step.optional) == (9, 20)  # the mask is no part of the step
    assert step.stall_cycles == 1 + 3 + 2 + 4 + 4 + 2 + 1 + 6 + 5


def test_a_warpgroup_waits_for_its_products_and_results():
    step = Program(HOPPER).roles[2].step
    products = 2 * 64 * 128 * 16 / 2048  # issued at 0, ready after 128 cycles
    exponentials = 2 + 8 + 20 - 2  # the second enters its unit eight cycles later
    assert chain_cycles(step, 2048) == products + exponentials + 2 + 2 + 1 + 6 + 5


def test_a_wait_may_leave_the_last_products_in_flight():
    loop = """
.L_x_1:
   -:-:-:Y:01  /*0000*/  HGMMA.64x128x16.F32.BF16 R24, gdesc[UR16], RZ, !UPT, gsb0
   -:-:-:Y:01  /*0010*/  HGMMA.64x128x16.F32.BF16 R88, gdesc[UR20], RZ, !UPT, gsb0
   -:-:-:Y:02  /*0020*/  WARPGROUP.DEPBAR.LE gsb0, 0x1
   -:-:-:Y:90  /*0030*/  FADD R1, R24, R25
   -:-:-:Y:02  /*0040*/  WARPGROUP.DEPBAR.LE gsb0, 0x0
   -:-:-:Y:05  /*0050*/  @P0 BRA `(.L_x_1)
"""
    products = 64  # cycles of each
    (role,) = (role for role in Program(loop).roles if role.step)
    assert chain_cycles(role.step, 2048) == products + 2 + 90 + 2 + 5
    every = Program(loop.replace("gsb0, 0x1", "gsb0, 0x0"))
    (role,) = (role for role in every.roles if role.step)
    assert chain_cycles(role.step, 2048) == 2 * products + 2 + 90 + 2 + 5


def test_shapes_of_blackwell_products_are_read_from_their_descriptors():
    (role,) = Program(BLACKWELL).roles
    assert role.step.products == {
        Product((128, 64, 16), 16, a_shared=True): 1,
        Product((128, 64, 16), 16, a_shared=False): 1,
    }


def test_each_warpgroup_asks_for_the_registers_of_its_role():
    ptx = Ptx(PTX)
    assert ptx.threads == 384
    assert [request.registers for request in ptx.warpgroups] == [240, 240, 24]


def test_an_indirect_branch_is_followed_by_its_table():
    table = PTX.replace(
        "@%p22 bra 	$L__BB0_11;", "brx.idx 	%r4, JTI0_0;\n$L__BB0_1:"
    ).replace(".maxntid", "JTI0_0:\n.branchtargets\n$L__BB0_11,\n$L__BB0_11,\n$L__BB0_1;\n.maxntid")
    assert [request.registers for request in Ptx(table).warpgroups] == [240, 240, 24]
