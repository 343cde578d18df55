"""The rules that tools/sass reads off compiled kernels catch what they are for, on hand-written SASS."""

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from tools.sass.compiled import ROOT, Kernel, compile_one, cuobjdump, default_archs
from tools.sass.flow import Edges, Instruction, UnreadableError, instructions, successors
from tools.sass.report import faults_of, kernels_launched_next
from tools.sass.rules import (
    accumulator_faults,
    cluster_faults,
    copy_faults,
    fence_faults,
    overlap_faults,
    producer_copy_faults,
    release_faults,
    store_faults,
)
from tools.sass.values import compared

KERNEL = re.compile(r"\b(\w+_kernel)\(")
Rule = Callable[[Sequence[Instruction], Edges], list[str]]


def assembled(text: str) -> list[tuple[int, str]]:
    """(address, instruction) of one instruction a line; "name:" before one makes its address known as $name."""
    lines = [line.strip() for line in text.strip().splitlines()]
    places = {line.split(":")[0]: 16 * i for i, line in enumerate(lines) if re.match(r"\w+:", line)}
    code = [re.sub(r"\$(\w+)", lambda name: hex(places[name[1]]), re.sub(r"^\w+: *", "", line)) for line in lines]
    return [(16 * i, line) for i, line in enumerate(code)]


def broken(rule: Rule, text: str, tables: Mapping[int, Sequence[int]] | None = None) -> list[str]:
    """The instructions, without addresses, at which a rule is broken."""
    code = instructions(assembled(text))
    return [fault.split(":")[0].split(maxsplit=1)[1] for fault in rule(code, successors(code, tables or {}))]


PRODUCT = "HGMMA.64x16x16.F32 R24, gdesc[UR8], R24"  # R24 to R31


def test_accumulators_may_be_read_behind_the_wait_for_their_group() -> None:
    text = f"""
        WARPGROUP.ARRIVE
        {PRODUCT}, UP0
        MOV R23, R32
        {PRODUCT}, gsb0
        WARPGROUP.DEPBAR.LE gsb0, 0x0
        FADD R24, R24, R31
        EXIT"""
    assert broken(accumulator_faults, text) == []
    assert broken(fence_faults, text) == []


@pytest.mark.parametrize(
    ("between", "touching"),
    [
        ("NOP", "FADD R0, R31, R1"),
        ("NOP", "MOV R24, RZ"),
        ("NOP", "LDS.128 R21, [R0]"),  # R21 to R24
        ("NOP", "STG.E.64 desc[UR4][R2.64], R30"),
        ("NOP", "LDG.E R0, desc[UR4][R30.64]"),
        ("NOP", "@P0 MOV R24, RZ"),
        ("NOP", "CALL.ABS.NOINC R2"),
        ("WARPGROUP.DEPBAR.LE gsb0, 0x1", "MOV R0, R24"),
        ("@P0 WARPGROUP.DEPBAR.LE gsb0, 0x0", "MOV R0, R24"),
    ],
)
def test_accumulators_that_are_touched_without_a_full_wait_are_found(between: str, touching: str) -> None:
    text = f"""
        {PRODUCT}, gsb0
        {between}
        {touching}
        EXIT"""
    assert broken(accumulator_faults, text) == [touching]


def test_a_wait_does_not_cover_a_wgmma_whose_group_is_still_open() -> None:
    text = f"""
        {PRODUCT}
        WARPGROUP.DEPBAR.LE gsb0, 0x0
        MOV R0, R24
        EXIT"""
    assert broken(accumulator_faults, text) == ["MOV R0, R24"]


def test_a_path_around_the_wait_is_found() -> None:
    text = f"""
        {PRODUCT}, gsb0
        @P0 BRA $behind
        WARPGROUP.DEPBAR.LE gsb0, 0x0
        behind: MOV R0, R24
        EXIT"""
    assert broken(accumulator_faults, text) == ["MOV R0, R24"]


def test_every_target_of_an_indirect_branch_is_followed() -> None:
    text = f"""
        {PRODUCT}, gsb0
        BRX R6 -0x20
        WARPGROUP.DEPBAR.LE gsb0, 0x0
        MOV R0, R24
        EXIT"""
    assert broken(accumulator_faults, text, {0x10: [0x20]}) == []
    assert broken(accumulator_faults, text, {0x10: [0x20, 0x30]}) == ["MOV R0, R24"]


def test_a_loop_of_wgmmas_needs_one_fence_before_it() -> None:
    loop = f"""
        loop: {PRODUCT}, gsb0
        WARPGROUP.DEPBAR.LE gsb0, 0x1
        @P0 BRA $loop
        WARPGROUP.DEPBAR.LE gsb0, 0x0
        EXIT"""
    assert broken(fence_faults, f"WARPGROUP.ARRIVE\n{loop}") == []
    assert broken(fence_faults, f"@P0 WARPGROUP.ARRIVE\n{loop}") == [f"{PRODUCT}, gsb0"]
    assert broken(fence_faults, f"NOP\n{loop}") == [f"{PRODUCT}, gsb0"]


@pytest.mark.parametrize(
    "between",
    ["MOV R24, RZ", "MOV R0, R31", "WARPGROUP.DEPBAR.LE gsb0, 0x0", "@P0 LDG.E.128 R28, desc[UR4][R2.64]"],
)
def test_a_wgmma_without_a_fence_after_another_access_is_found(between: str) -> None:
    text = f"""
        WARPGROUP.ARRIVE
        {PRODUCT}
        {between}
        {PRODUCT}, gsb0
        EXIT"""
    assert broken(fence_faults, text) == [f"{PRODUCT}, gsb0"]
    assert broken(fence_faults, text.replace(between, f"{between}\nWARPGROUP.ARRIVE")) == []


def test_wgmmas_of_different_shapes_need_a_fence_between_them_on_the_same_registers() -> None:
    wide = "HGMMA.64x32x16.F32 R16, gdesc[UR8], R16"  # R16 to R31
    apart = "HGMMA.64x32x16.F32 R32, gdesc[UR8], R32"
    assert broken(fence_faults, f"WARPGROUP.ARRIVE\n{PRODUCT}\n{wide}, gsb0\nEXIT") == [f"{wide}, gsb0"]
    assert broken(fence_faults, f"WARPGROUP.ARRIVE\n{PRODUCT}\nWARPGROUP.ARRIVE\n{wide}, gsb0\nEXIT") == []
    assert broken(fence_faults, f"WARPGROUP.ARRIVE\n{PRODUCT}\n{apart}, gsb0\nEXIT") == []


# As in hopper_gemm_kernel: a step's copies are announced in the next step, when all but the newest group have arrived.
PRODUCER = """
    UMOV UR6, 0xffffffff
    UMOV UR4, URZ
    @P3 BRA $end
    loop: IMAD.U32 R0, RZ, RZ, UR6
    UMOV UR6, UR4
    @P4 BRA $copied
    LDGSTS.E.BYPASS.128 [R14], desc[UR18][R2.64], P0
    copied: LDGDEPBAR
    ISETP.GE.AND P0, PT, R0, RZ, PT
    @!P0 BRA $next
    DEPBAR.LE SB0, 0x1
    FENCE.VIEW.ASYNC.S
    @!P1 SYNCS.ARRIVE.TRANS64.A1T0 RZ, [R0+URZ+0x36000], RZ
    next: UIADD3 UR4, UR6, 0x1, URZ
    UISETP.NE.AND UP0, UPT, UR4, 0x3, UPT
    USEL UR4, UR4, URZ, UP0
    @P2 BRA $loop
    end: ISETP.LE.AND P0, PT, RZ, UR6, PT
    DEPBAR.LE SB0, 0x0
    @!P0 EXIT
    FENCE.VIEW.ASYNC.S
    @P1 EXIT
    SYNCS.ARRIVE.TRANS64.A1T0 RZ, [UR6+0x36000], RZ
    EXIT"""
IN_LOOP = "@!P1 SYNCS.ARRIVE.TRANS64.A1T0 RZ, [R0+URZ+0x36000], RZ"
AT_END = "SYNCS.ARRIVE.TRANS64.A1T0 RZ, [UR6+0x36000], RZ"


def test_copies_may_be_announced_one_step_late() -> None:
    assert broken(copy_faults, PRODUCER) == []


@pytest.mark.parametrize(
    ("line", "instead", "where"),
    [
        ("FENCE.VIEW.ASYNC.S\n    @!P1", "NOP\n    @!P1", IN_LOOP),
        ("FENCE.VIEW.ASYNC.S\n    @P1", "NOP\n    @P1", AT_END),
        ("FENCE.VIEW.ASYNC.S\n    @P1", "@P5 FENCE.VIEW.ASYNC.S\n    @P1", AT_END),
        ("DEPBAR.LE SB0, 0x1\n    FENCE.VIEW.ASYNC.S", "FENCE.VIEW.ASYNC.S\n    DEPBAR.LE SB0, 0x1", IN_LOOP),
        ("DEPBAR.LE SB0, 0x1", "NOP", IN_LOOP),
        ("DEPBAR.LE SB0, 0x1", "DEPBAR.LE SB0, 0x2", IN_LOOP),
        ("DEPBAR.LE SB0, 0x0", "DEPBAR.LE SB0, 0x1", AT_END),
        ("DEPBAR.LE SB0, 0x0", "NOP", AT_END),
        ("copied: LDGDEPBAR", "copied: NOP", AT_END),
        ("@!P0 BRA $next", "NOP", IN_LOOP),  # announces what is not there yet in the first step
    ],
)
def test_copies_that_are_announced_too_early_are_found(line: str, instead: str, where: str) -> None:
    assert PRODUCER.count(line) == 1
    assert where in broken(copy_faults, PRODUCER.replace(line, instead))


def test_an_end_with_copies_under_way_is_found() -> None:
    copy = "LDGSTS.E.BYPASS.128 [R14], desc[UR18][R2.64], P0"
    assert broken(copy_faults, f"{copy}\nLDGDEPBAR\nDEPBAR.LE SB0, 0x0\nEXIT") == []
    assert broken(copy_faults, f"{copy}\nLDGDEPBAR\nEXIT") == ["EXIT"]
    assert broken(copy_faults, f"{copy}\nDEPBAR.LE SB0, 0x0\nEXIT") == ["EXIT"]


def test_a_thread_that_does_not_copy_arrives_as_it_likes() -> None:
    assert broken(copy_faults, f"@P0 EXIT\n{AT_END}\nEXIT") == []


def test_stores_are_fenced_before_they_are_announced() -> None:
    text = f"loop: STS.128 [R0], R4\nFENCE.VIEW.ASYNC.S\n{AT_END}\n@P0 BRA $loop\nEXIT"
    assert broken(store_faults, text) == []
    assert broken(store_faults, text.replace("FENCE.VIEW.ASYNC.S", "NOP")) == [AT_END]
    assert broken(store_faults, text.replace("FENCE", "@P1 FENCE")) == [AT_END]


def test_copies_of_those_that_store_themselves_are_not_what_is_announced() -> None:
    copy, count = "LDGSTS.E.BYPASS.128 [R14], desc[UR18][R2.64], P0", "USETMAXREG.DEALLOC.CTAPOOL 0x20"
    other = (
        f"other: {count}\n{copy}\nLDGDEPBAR\nSTS.128 [R0], R4\nFENCE.VIEW.ASYNC.S\n{AT_END}\nDEPBAR.LE SB0, 0x0\nEXIT"
    )
    wrong = f"@P0 BRA $other\n{count}\n{copy}\nLDGDEPBAR\nDEPBAR.LE SB0, 0x0\n{AT_END}\nEXIT\n{other}"
    right = wrong.replace(f"DEPBAR.LE SB0, 0x0\n{AT_END}", f"DEPBAR.LE SB0, 0x0\nFENCE.VIEW.ASYNC.S\n{AT_END}")
    assert broken(producer_copy_faults, right) == []
    assert broken(producer_copy_faults, wrong) == [AT_END]
    assert broken(copy_faults, right) == [AT_END]


# As in hopper_gemm_kernel: a step's operands are given back in the next step, when all but the newest group are over.
CONSUMER = f"""
    UMOV UR7, URZ
    loop: ISETP.NE.AND P0, PT, RZ, UR7, PT
    UIADD3 UR7, UR7, 0x1, URZ
    {PRODUCT}, UP0
    ISETP.NE.OR P0, PT, R12, RZ, !P0
    {PRODUCT}, gsb0
    WARPGROUP.DEPBAR.LE gsb0, 0x1
    @!P0 SYNCS.ARRIVE.TRANS64.A1T0 RZ, [R5+URZ+0x36018], RZ
    @P2 BRA $loop
    WARPGROUP.DEPBAR.LE gsb0, 0x0
    @!P1 SYNCS.ARRIVE.TRANS64.A1T0 RZ, [UR7+0x36018], RZ
    EXIT"""
BACK_IN_LOOP = "@!P0 SYNCS.ARRIVE.TRANS64.A1T0 RZ, [R5+URZ+0x36018], RZ"
BACK_AT_END = "@!P1 SYNCS.ARRIVE.TRANS64.A1T0 RZ, [UR7+0x36018], RZ"


def test_operands_may_be_given_back_one_step_late() -> None:
    assert broken(release_faults, CONSUMER) == []
    assert (
        broken(release_faults, CONSUMER.replace("ISETP.NE.OR P0, PT, R12, RZ", "ISETP.GT.U32.OR P0, PT, R12, 0x1"))
        == []
    )


@pytest.mark.parametrize(
    ("line", "instead", "where"),
    [
        ("WARPGROUP.DEPBAR.LE gsb0, 0x1", "NOP", BACK_IN_LOOP),
        ("WARPGROUP.DEPBAR.LE gsb0, 0x1", "WARPGROUP.DEPBAR.LE gsb0, 0x2", BACK_IN_LOOP),
        ("WARPGROUP.DEPBAR.LE gsb0, 0x0", "NOP", BACK_AT_END),
        ("WARPGROUP.DEPBAR.LE gsb0, 0x0", "@P3 WARPGROUP.DEPBAR.LE gsb0, 0x0", BACK_AT_END),
        (f"{PRODUCT}, gsb0", PRODUCT, BACK_AT_END),
        ("ISETP.NE.OR P0, PT, R12, RZ, !P0", "ISETP.NE.AND P0, PT, R12, RZ, PT", BACK_IN_LOOP),  # in the first step too
    ],
)
def test_operands_that_are_given_back_too_early_are_found(line: str, instead: str, where: str) -> None:
    assert CONSUMER.count(line) == 1
    assert where in broken(release_faults, CONSUMER.replace(line, instead))


MULTICAST = "UTMALDG.2D.MULTICAST [UR8], [UR4], UR10"
FAR_ARRIVAL = "@!P0 SYNCS.ARRIVE.TRANS64.RED.A1T0 RZ, [R5+URZ], RZ"
# ptxas asks at each barrier whether there is a cluster.
CLUSTER = f"""
    LDC R0, c[0x0][0x140]
    ISETP.EQ.U32.AND P2, PT, R0, 0x1, PT
    @!P2 BRA $alone
    UCGABAR_ARV
    BRA $arrived
    alone: NOP
    arrived: @!P2 BRA $block
    UCGABAR_WAIT
    BRA $on
    block: BAR.SYNC.DEFER_BLOCKING 0x0
    on: @P1 BRA $consumer
    {MULTICAST}
    BRA $end
    consumer: {FAR_ARRIVAL}
    end: UCGABAR_ARV
    UCGABAR_WAIT
    EXIT"""


def test_blocks_of_a_cluster_may_reach_each_other_between_its_barriers() -> None:
    assert broken(cluster_faults, CLUSTER) == []
    assert broken(cluster_faults, "SYNCS.ARRIVE.TRANS64.A1T0 RZ, [R0], RZ\nUTMALDG.2D [UR8], [UR4]\nEXIT") == []


@pytest.mark.parametrize(
    ("line", "instead", "where"),
    [
        ("UCGABAR_WAIT\n    BRA $on", "BRA $on", [MULTICAST, FAR_ARRIVAL, "EXIT"]),
        ("UCGABAR_ARV\n    BRA $arrived", "BRA $arrived", [MULTICAST, FAR_ARRIVAL, "EXIT"]),
        ("@!P2 BRA $block", "@P3 BRA $block", [MULTICAST, FAR_ARRIVAL, "EXIT"]),
        ("UCGABAR_WAIT\n    EXIT", "EXIT", ["EXIT"]),
        ("UCGABAR_WAIT\n    EXIT", "@P3 UCGABAR_WAIT\n    EXIT", ["EXIT"]),
        ("BRA $end", "EXIT", ["EXIT"]),
        ("UCGABAR_WAIT\n    EXIT", f"UCGABAR_WAIT\n    {FAR_ARRIVAL}\n    EXIT", [FAR_ARRIVAL]),
    ],
)
def test_blocks_that_reach_each_other_too_early_or_end_too_early_are_found(
    line: str, instead: str, where: list[str]
) -> None:
    assert CLUSTER.count(line) == 1
    assert broken(cluster_faults, CLUSTER.replace(line, instead)) == where


def test_memory_may_be_touched_behind_the_wait_for_the_previous_kernel() -> None:
    text = """
        LDC R2, c[0x0][0x210]
        ACQBULK
        LDG.E R0, desc[UR4][R2.64]
        STG.E desc[UR4][R2.64], R0
        EXIT"""
    assert broken(overlap_faults, text) == []


@pytest.mark.parametrize(
    "access",
    [
        "LDG.E R0, desc[UR4][R2.64]",
        "@P0 STG.E desc[UR4][R2.64], R0",
        "LDGSTS.E.128 [R0], desc[UR4][R2.64]",
        "UTMALDG.2D [UR12], [UR26]",
        "LD.E R0, desc[UR4][R2.64]",
        "RED.E.ADD desc[UR4][R2.64], R0",
        "ATOMG.E.ADD PT, R0, desc[UR4][R2.64], R1",
    ],
)
def test_memory_that_is_touched_before_the_wait_is_found(access: str) -> None:
    assert broken(overlap_faults, f"{access}\nACQBULK\nEXIT") == [access]
    assert broken(overlap_faults, f"@P1 BRA $on\nACQBULK\non: {access}\nACQBULK\nEXIT") == [access]


def test_loads_alone_can_be_allowed_before_the_wait() -> None:
    load, store = "LDG.E R0, desc[UR4][R2.64]", "STG.E desc[UR4][R2.64], R0"
    faults = broken(lambda code, edges: overlap_faults(code, edges, True), f"{load}\n{store}\nACQBULK\n{store}\nEXIT")
    assert faults == [store]


@pytest.mark.parametrize(
    "text", ["@P0 EXIT\nACQBULK\nEXIT", "@P1 BRA $end\nACQBULK\nEXIT\nend: @P0 EXIT\nACQBULK\nEXIT"]
)
def test_an_end_without_the_wait_is_found(text: str) -> None:
    assert broken(overlap_faults, text) == ["@P0 EXIT"]
    assert broken(overlap_faults, "@P0 ACQBULK\nEXIT") == ["EXIT"]


def test_a_subroutine_returns_only_behind_its_own_calls() -> None:
    text = """
        CALL.REL.NOINC $first
        ACQBULK
        CALL.REL.NOINC $second
        STG.E desc[UR4][R2.64], R0
        EXIT
        first: RET.REL.NODEC R4 0x0
        second: RET.REL.NODEC R4 0x0"""
    assert broken(overlap_faults, text) == []
    faults = broken(overlap_faults, text.replace("$second", "$first"))
    assert faults == ["STG.E desc[UR4][R2.64], R0", "EXIT"]


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (overlap_faults, "BRX R6 -0x10\nACQBULK\nEXIT"),
        (overlap_faults, "JMP 0x10\nEXIT"),
        (overlap_faults, "BRA 0x8\nEXIT"),
        (overlap_faults, "BSSY B0, $end\nBSYNC B0\nACQBULK\nend: EXIT"),
        (accumulator_faults, "HGMMA.64x16x16.F32 R24, R4, gdesc[UR8], R24, gsb0\nEXIT"),
        (accumulator_faults, "HGMMA.64x16x16.F16 R24, gdesc[UR8], R24, gsb0\nEXIT"),
        (fence_faults, "HGMMA.64x16x16.F32 R24, gdesc[UR8], R48, gsb0\nEXIT"),
    ],
)
def test_what_cannot_be_read_is_refused(rule: Rule, text: str) -> None:
    with pytest.raises(UnreadableError):
        broken(rule, text)


@pytest.mark.parametrize("name", ["LT", "LE", "GT", "GE", "EQ", "NE"])
def test_comparisons_of_ranges_are_those_of_all_their_numbers(name: str) -> None:
    true_of = {
        "LT": int.__lt__,
        "LE": int.__le__,
        "GT": int.__gt__,
        "GE": int.__ge__,
        "EQ": int.__eq__,
        "NE": int.__ne__,
    }
    ranges = [(low, high) for low in range(-2, 3) for high in range(low, 3)]
    for a in ranges:
        for b in ranges:
            outcomes = {true_of[name](x, y) for x in range(a[0], a[1] + 1) for y in range(b[0], b[1] + 1)}
            expected = (int(outcomes.pop()),) * 2 if len(outcomes) == 1 else None
            assert compared(name, a, b) == expected, (a, b)


def test_the_kernels_that_have_to_wait_are_those_of_the_sources() -> None:
    kernels = {name for path in (ROOT / "csrc" / "cuda").rglob("*.cu*") for name in KERNEL.findall(path.read_text())}
    assert "hopper_gemm_kernel" in kernels_launched_next()
    assert kernels_launched_next() <= kernels
    assert "90a" in default_archs()


@pytest.fixture(scope="module")
def hopper_kernels(tmp_path_factory: pytest.TempPathFactory) -> list[Kernel]:
    if not (shutil.which("nvcc") or Path("/usr/local/cuda/bin/nvcc").exists()):
        pytest.skip("needs nvcc")
    try:
        cuobjdump()
    except SystemExit as missing:
        pytest.skip(str(missing))
    sources = (ROOT / "csrc" / "cuda").glob("*.cu")
    source = next(path for path in sources if "hopper_gemm_kernel" in KERNEL.findall(path.read_text()))
    return compile_one(source, "90a", tmp_path_factory.mktemp("hopper"))


@pytest.mark.slow
@pytest.mark.parametrize(("blocks", "experts"), [(1, "usual"), (2, "usual"), (1, "special"), (2, "transposed")])
@pytest.mark.parametrize(
    ("name", "rules"),
    [
        (r"WARPGROUP\.ARRIVE", [fence_faults]),
        (r"WARPGROUP\.DEPBAR\.LE gsb0, 0x0", [accumulator_faults, release_faults]),
        (r"WARPGROUP\.DEPBAR\.LE gsb0, 0x1", [release_faults]),
        (r"DEPBAR\.LE SB0", [copy_faults]),
        ("LDGDEPBAR", [copy_faults]),
        (r"FENCE\.VIEW\.ASYNC", [copy_faults]),
        ("ACQBULK", [overlap_faults]),
        ("UCGABAR_ARV", [cluster_faults]),
        ("UCGABAR_WAIT", [cluster_faults]),
    ],
)
def test_no_wait_or_fence_of_the_hopper_kernel_can_be_left_out(
    hopper_kernels: list[Kernel], blocks: int, experts: str, name: str, rules: list[Rule]
) -> None:
    wanted = f"hopper_gemm_kernel<__half, down, false, {blocks}, {experts}>"
    hopper_kernel = next(kernel for kernel in hopper_kernels if kernel.name == wanted)
    assert faults_of(hopper_kernel) == []
    sass = hopper_kernel.sass
    copying = next(i for i, (_, text) in enumerate(sass) if text.startswith("LDGSTS"))
    found = [i for i, (_, text) in enumerate(sass) if re.match(name, text)]
    if name.startswith("FENCE"):
        found = [i for i in found if i > copying]  # the one before is that of the barriers' initialisation
    assert found or (blocks == 1 and name.startswith("UCGABAR"))
    for i in found:
        code = instructions([*sass[:i], (sass[i][0], "NOP"), *sass[i + 1 :]])
        edges = successors(code, hopper_kernel.branch_tables)
        for rule in rules:
            assert rule(code, edges), (sass[i], rule)
