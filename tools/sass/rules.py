"""Waits and fences whose lack no simulator shows that executes wgmma and copies at once: rules on the SASS of sm_90a.

Every rule is a function from a kernel's code and its edges (flow.py) to what breaks it, on any path.

- accumulators of wgmma are not touched until their group has been waited for, and are fenced before wgmma takes them
  (PTX ISA, "wgmma.fence", "wgmma.wait_group");
- copies by cp.async into what wgmma reads are waited for and fenced towards the asynchronous proxy by the thread that
  made them, before its warp announces them at a barrier (PTX ISA, "Async proxy"); so are a thread's own stores;
- what wgmma reads is given back at a barrier when the group has been waited for;
- blocks of a cluster reach each other's shared memory only between two of its barriers, and end behind the second;
- programmatic dependent launch: no global memory before the wait for the previous kernel, and no end without it.

Not seen: which barrier or stage an address names, and whether a warp is together where one lane arrives for all
(__syncwarp() is no instruction where ptxas knows that it is). The simulator sees wrong stages and missing arrivals.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

from tools.sass.flow import Edges, Instruction, accumulators, registers, solve
from tools.sass.values import Values, after, join_values, truth

Code = Sequence[Instruction]


def accumulator_faults(code: Code, edges: Edges) -> list[str]:
    """What touches accumulators of an HGMMA before WARPGROUP.DEPBAR.LE gsb0, 0x0 has waited for its group.

    Waiting for all but some groups clears nothing here, nor does waiting where no HGMMA has closed the group.
    """

    def step(i: int, _: int, flying: tuple[int, int]) -> tuple[int, int]:
        one, (open_group, closed) = code[i], flying
        if one.opcode == "HGMMA":
            open_group |= accumulators(one)
            if closes_group(one):
                # A guarded one may leave the group open.
                open_group, closed = open_group if one.guard else 0, closed | open_group
        elif waits_for_all(one):
            closed = 0
        return open_group, closed

    before = solve(edges, (0, 0), step, lambda a, b: (a[0] | b[0], a[1] | b[1]))
    faults = []
    for one, flying in zip(code, before, strict=True):
        if flying is not None and one.opcode != "HGMMA" and registers(one) & (flying[0] | flying[1]):
            faults.append(f"{one}: touches accumulators of a wgmma that has not been waited for")
    return faults


def fence_faults(code: Code, edges: Edges) -> list[str]:
    """HGMMAs without WARPGROUP.ARRIVE since the start, the last full wait, or another access to their accumulators.

    HGMMAs of one shape may follow each other on the same accumulators; of another shape they count as another access.
    """
    # The state has bit 256 * kind + n if Rn's last access may have been of that kind: 0 not by HGMMA, else its columns.
    everything = (1 << 256) - 1
    kinds = sorted({one.name for one in code if one.opcode == "HGMMA"})
    each_kind = sum(1 << 256 * kind for kind in range(len(kinds) + 1))

    def step(i: int, _: int, accesses: int) -> int:
        one = code[i]
        if one.opcode == "HGMMA":
            own = accumulators(one)
            # Whether a guarded one was the last access is open.
            kept = accesses if one.guard else accesses & ~(own * each_kind)
            return kept | own << 256 * (1 + kinds.index(one.name))
        if one.name == "WARPGROUP.ARRIVE":
            return accesses if one.guard else 0
        return accesses | (everything if waits_for_all(one) else registers(one))

    before = solve(edges, everything, step, lambda a, b: a | b)
    faults = []
    for one, accesses in zip(code, before, strict=True):
        if one.opcode == "HGMMA" and accesses is not None:
            own_kind = everything << 256 * (1 + kinds.index(one.name))
            if accesses & ~own_kind & accumulators(one) * each_kind:
                faults.append(f"{one}: no fence since something else touched its accumulators")
    return faults


def closes_group(one: Instruction) -> bool:
    return "gsb0" in one.operands


def waits_for_all(one: Instruction) -> bool:
    return one.name == "WARPGROUP.DEPBAR.LE" and one.operands == ("gsb0", "0x0") and not one.guard


class Groups(NamedTuple):
    """A thread's groups of asynchronous work, by how far they are; counted up to MANY, which stands for more."""

    ready: int = 0  # over, visible to whom the thread tells, not told yet
    unfenced: int = 0  # waited for, to be fenced
    flying: int = 0  # closed, not waited for
    open: int = 0  # 1 if there is work that belongs to no group yet
    working: bool = False  # whether this thread has ever begun such work


MANY = 3
Counts = TypeVar("Counts")


def with_waits(groups: Groups, pending: int) -> Groups:
    """After a wait for all but the `pending` newest groups."""
    left = min(groups.flying, pending)
    return groups._replace(flying=left, unfenced=min(MANY, groups.unfenced + groups.flying - left))


def with_closed(groups: Groups) -> Groups:
    return groups._replace(flying=min(MANY, groups.flying + 1), open=0, working=True)


def with_fence(groups: Groups) -> Groups:
    return groups._replace(unfenced=0, ready=min(MANY, groups.ready + groups.unfenced))


def with_one_told(groups: Groups) -> Groups:
    return groups._replace(ready=max(0, groups.ready - 1))


def counted(
    code: Code, edges: Edges, start: Counts, moved: Callable[[Instruction, Counts], Counts]
) -> list[Mapping[Counts, Values]]:
    """The counts that can be before each instruction, each with what is known of the registers then.

    They are kept apart for branches and guards on whether there has been a step before: what the registers exclude is
    not followed. `moved(instruction, counts)` is what an instruction leaves that may have been executed.
    """

    def can_follow(i: int, j: int, executed: bool | None) -> bool:
        one = code[i]
        if executed is None or one.opcode not in ("BRA", "EXIT") or one.modifiers or len(one.operands) > 1:
            return True
        only_way = one.opcode == "BRA" and len(edges[i]) == 1
        return only_way or executed != (j == i + 1)

    def step(i: int, j: int, worlds: Mapping[Counts, Values]) -> Mapping[Counts, Values]:
        reached: dict[Counts, Values] = {}
        for counts, values in worlds.items():
            executed = truth(values, code[i].guard)
            if can_follow(i, j, executed):
                new_counts = counts if executed is False else moved(code[i], counts)
                new_values = after(values, code[i])
                known = reached.get(new_counts)
                reached[new_counts] = new_values if known is None else join_values(known, new_values)
        return reached

    def join(a: Mapping[Counts, Values], b: Mapping[Counts, Values]) -> Mapping[Counts, Values]:
        both = {counts: join_values(a[counts], b[counts]) for counts in a if counts in b}
        return {**a, **b, **both}

    nothing_known: Values = {}
    first: Mapping[Counts, Values] = {start: nothing_known}
    before = solve(edges, first, step, join)
    # Where a guard is known not to hold, the instruction is not executed.
    return [
        {counts: values for counts, values in (worlds or {}).items() if truth(values, one.guard) is not False}
        for one, worlds in zip(code, before, strict=True)
    ]


def copy_faults(code: Code, edges: Edges) -> list[str]:
    """Arrivals of a thread that copies without one group to announce, and ends before all copies are waited for.

    Every arrival (SYNCS.ARRIVE with A1T0; without it TMA's bytes are announced) announces the oldest group: of those
    closed by LDGDEPBAR all but the n newest are complete after DEPBAR.LE SB0, n and readable for wgmma after
    FENCE.VIEW.ASYNC. Exactly one must be, or the announcements are not in step with the groups. An arrival under a
    guard is one lane's for its warp; a wait or a fence under a guard counts for nothing.
    """

    def moved(one: Instruction, groups: Groups) -> Groups:
        if one.opcode == "LDGSTS":
            return groups._replace(open=1, working=True)
        if arrives(one):
            return with_one_told(groups)
        if one.guard:
            return groups
        if one.opcode == "LDGDEPBAR":
            return with_closed(groups)
        if one.name == "DEPBAR.LE" and one.operands[0] == "SB0":
            return with_waits(groups, int(one.operands[1], 16))
        return with_fence(groups) if one.name.startswith("FENCE.VIEW.ASYNC") else groups

    faults = []
    for one, worlds in zip(code, counted(code, edges, Groups(), moved), strict=True):
        for groups in (groups for groups in worlds if groups.working):
            if arrives(one) and (groups.ready != 1 or groups.unfenced or groups.open):
                faults.append(f"{one}: announces copies with {groups}")
            if one.opcode == "EXIT" and (groups.flying or groups.open):
                faults.append(f"{one}: ends with {groups}")
        if worlds and one.opcode == "LDGDEPBAR" and one.guard:
            faults.append(f"{one}: closes a group of copies under a condition")
    return faults


def producer_copy_faults(code: Code, edges: Edges) -> list[str]:
    """copy_faults() of the warpgroups that do not store themselves (STS): what the others copy, wgmma does not read.

    A warpgroup's code is what can be reached from where its registers are set.
    """
    reached = []
    for start in (i for i, one in enumerate(code) if one.opcode == "USETMAXREG"):
        of_role, new = {start}, [start]
        while new:
            fresh = set(edges[new.pop()]) - of_role
            of_role |= fresh
            new += fresh
        reached.append(of_role)
    storing = [of_role for of_role in reached if any(code[i].opcode == "STS" for i in of_role)]
    left_out = set().union(*storing) - set().union(*(of_role for of_role in reached if of_role not in storing))
    nothing = Instruction(0, "", "NOP", ())
    return copy_faults([nothing if i in left_out else one for i, one in enumerate(code)], edges)


def store_faults(code: Code, edges: Edges) -> list[str]:
    """Arrivals of a thread that has written shared memory (STS) since its last FENCE.VIEW.ASYNC.

    For threads that write what wgmma reads, and arrive where it is complete. A fence under a guard counts for nothing.
    """

    def step(i: int, _: int, written: bool) -> bool:
        one = code[i]
        fences = one.name.startswith("FENCE.VIEW.ASYNC") and not one.guard
        return one.opcode == "STS" or (written and not fences)

    before = solve(edges, False, step, lambda a, b: a or b)
    faults = []
    for one, written in zip(code, before, strict=True):
        if written and arrives(one):
            faults.append(f"{one}: announces stores that are not fenced")
    return faults


def release_faults(code: Code, edges: Edges) -> list[str]:
    """Arrivals of a thread that multiplies while wgmmas that may read what it gives back are under way, and such ends.

    Every arrival gives back the operands of the oldest group: one must have been waited for, or none be under way.
    Groups are closed by HGMMA's gsb0 and waited for by WARPGROUP.DEPBAR.LE gsb0, n. Guards as in copy_faults().
    """

    def moved(one: Instruction, groups: Groups) -> Groups:
        if one.opcode == "HGMMA":
            begun = groups._replace(open=1, working=True)
            return with_closed(begun) if closes_group(one) and not one.guard else begun
        if arrives(one):
            return with_one_told(groups)
        if one.name == "WARPGROUP.DEPBAR.LE" and one.operands[0] == "gsb0" and not one.guard:
            return with_fence(with_waits(groups, int(one.operands[1], 16)))  # what was read needs no fence
        return groups

    faults = []
    for one, worlds in zip(code, counted(code, edges, Groups(), moved), strict=True):
        for groups in (groups for groups in worlds if groups.working):
            if arrives(one) and (groups.open or (groups.flying and not groups.ready)):
                faults.append(f"{one}: gives back what wgmma may read with {groups}")
            if one.opcode == "EXIT" and (groups.open or groups.flying):
                faults.append(f"{one}: ends with {groups}")
    return faults


def arrives(one: Instruction) -> bool:
    return one.name.startswith("SYNCS.ARRIVE") and "A1T0" in one.modifiers


def cluster_faults(code: Code, edges: Edges) -> list[str]:
    """Accesses to other blocks' shared memory but between two barriers of the cluster, and ends but behind the second.

    Of a kernel with such accesses, which are TMA's multicasts and arrivals by address in the cluster (SYNCS.ARRIVE
    with RED). A barrier is UCGABAR_ARV, then UCGABAR_WAIT; under a guard it counts for nothing.
    """
    if not any(reaches_other_blocks(one) for one in code):
        return []

    def moved(one: Instruction, barriers: tuple[int, bool]) -> tuple[int, bool]:
        count, arrived = barriers
        if one.guard or one.opcode not in ("UCGABAR_ARV", "UCGABAR_WAIT"):
            return barriers
        return (count, True) if one.opcode == "UCGABAR_ARV" else (min(MANY, count + arrived), False)

    faults = []
    for one, worlds in zip(code, counted(code, edges, (0, False), moved), strict=True):
        for count, arrived in worlds:
            if reaches_other_blocks(one) and (count != 1 or arrived):
                faults.append(f"{one}: another block's memory behind {count} barriers of the cluster")
            if one.opcode == "EXIT" and count != 2:
                faults.append(f"{one}: the end behind {count} barriers of the cluster")
    return faults


def reaches_other_blocks(one: Instruction) -> bool:
    return "MULTICAST" in one.modifiers or (arrives(one) and "RED" in one.modifiers)


WAIT = "ACQBULK"  # griddepcontrol.wait
LOADS = {"LD", "LDG"}
GLOBAL = LOADS | {
    *("ST", "STG", "LDGSTS", "ATOM", "ATOMG", "RED", "REDG", "TEX", "TLD", "SULD", "SUST", "SUATOM", "SURED"),
    *("UTMALDG", "UTMASTG", "UTMAREDG", "UBLKCP", "UBLKRED"),
}


def overlap_faults(code: Code, edges: Edges, loads_first: bool = False) -> list[str]:
    """Accesses to global memory that can come before the wait for the previous kernel, and ends without it.

    Args:
        loads_first: whether loads may come before, for a kernel that begins with what no kernel of the call writes.
    """

    def step(i: int, _: int, early: bool) -> bool:
        return early and (code[i].opcode != WAIT or bool(code[i].guard))

    before = solve(edges, True, step, lambda a, b: a or b)
    faults = []
    for one, early in zip(code, before, strict=True):
        if early and one.opcode in GLOBAL - (LOADS if loads_first else set()):
            faults.append(f"{one}: global memory before the wait for the previous kernel")
        if early and one.opcode == "EXIT":
            faults.append(f"{one}: the end without the wait for the previous kernel")
    return faults
