"""A compiled kernel as a graph: its SASS as instructions, the paths between them, and what holds on every path.

Nothing here knows what a rule is about (rules.py does). Where the text leaves something open, more is assumed to
happen than can: a guarded instruction may or may not be executed, both ways of a branch can be taken, and an operand
is as wide as the widest that the instruction's modifiers allow. What cannot be read raises :class:`UnreadableError`.
"""

import heapq
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

State = TypeVar("State")
Edges = list[list[int]]  # by instruction: those that can be next, as positions in the code


class UnreadableError(Exception):
    """An instruction whose effect is not known here, so that nothing can be said about the kernel."""


@dataclass(frozen=True)
class Instruction:
    address: int
    guard: str  # a predicate such as P0 or !UP1; empty: always executed
    name: str  # with modifiers, such as LDG.E.128
    operands: tuple[str, ...]

    @property
    def opcode(self) -> str:
        return self.name.split(".")[0]

    @property
    def modifiers(self) -> list[str]:
        return self.name.split(".")[1:]

    def __str__(self) -> str:
        guard = f"@{self.guard} " if self.guard else ""
        return f"{self.address:#06x} {guard}{self.name} {', '.join(self.operands)}".rstrip()


def instructions(lines: Iterable[tuple[int, str]]) -> list[Instruction]:
    """The code from (address, text) as cuobjdump -sass gives them; what is never executed (@!PT) becomes a NOP."""
    code = []
    for address, text in lines:
        guard, rest = "", text.strip()
        if rest.startswith("@"):
            guard, rest = rest[1:].split(maxsplit=1)
        name, _, operands = rest.partition(" ")
        if guard in ("!PT", "!UPT"):
            guard, name, operands = "", "NOP", ""
        if guard in ("PT", "UPT"):
            guard = ""
        code.append(Instruction(address, guard, name, tuple(part.strip() for part in operands.split(",") if part)))
    return code


def width(instruction: Instruction) -> int:
    """Most registers in a row that an operand of the instruction can stand for, unless it is an address."""
    modifiers, opcode = instruction.modifiers, instruction.opcode
    if opcode.endswith("MMA"):
        return 16
    if "128" in modifiers or (opcode in ("LDSM", "STSM") and "4" in modifiers):
        return 4
    doubles = ("DADD", "DMUL", "DFMA", "DSETP", "DMNMX", "CS2R", "LDSM", "STSM")
    return 2 if opcode in doubles or {"64", "U64", "S64", "F64", "WIDE"} & set(modifiers) else 1


def registers(instruction: Instruction) -> int:
    """The general registers that the instruction may read or write: bit n for Rn."""
    if instruction.name.startswith("CALL.ABS"):
        return (1 << 256) - 1  # code that is not here
    mask = 0
    for operand in instruction.operands:
        for number, suffix in re.findall(r"(?<!\w)R(\d+)((?:\.\w+)*)", operand):
            count = width(instruction) if "[" not in operand else 2 if ".64" in suffix else 1
            mask |= ((1 << count) - 1) << int(number)
    return mask


def accumulators(instruction: Instruction) -> int:
    """The registers of an HGMMA's accumulators: bit n for Rn. All it reads besides is shared memory."""
    shape = re.fullmatch(r"HGMMA\.64x(\d+)x16\.F32(\.BF16)?", instruction.name)
    operands = instruction.operands
    if not shape or len(operands) < 3 or not re.fullmatch(r"R\d+", operands[0]) or not operands[1].startswith("gdesc["):
        raise UnreadableError(f"{instruction}: not a product of two operands in shared memory with float32 sums")
    if operands[2] not in (operands[0], "RZ"):
        raise UnreadableError(f"{instruction}: the sums are read from other registers than they are written to")
    return ((1 << int(shape[1]) // 2) - 1) << int(operands[0][1:])


def branch_target(instruction: Instruction) -> int | None:
    """The address that a BRA, CALL.REL, BSSY or WARPSYNC.COLLECTIVE names last."""
    found = re.search(r"(0x[0-9a-f]+)$", instruction.operands[-1]) if instruction.operands else None
    return int(found[1], 16) if found else None


def successors(code: Sequence[Instruction], tables: Mapping[int, Sequence[int]]) -> Edges:
    """Which instructions can follow each; `tables`: the targets of every indirect branch, by its address.

    A subroutine of the kernel returns behind the calls of it, whichever it was called from. An absolute call, which is
    the device runtime's assert, returns behind itself. A BSYNC goes on behind itself, as every BSSY before it must say.
    """
    at = {instruction.address: i for i, instruction in enumerate(code)}
    edges = []  # within subroutines: a call goes on behind itself, and a return ends
    for i, one in enumerate(code):
        following = [i + 1] if i + 1 < len(code) else []
        conditional = following if one.guard else []
        if one.opcode == "BRA":
            more = following if one.modifiers or len(one.operands) > 1 else conditional
            nexts = [position(at, one, branch_target(one)), *more]
        elif one.opcode in ("BRX", "BRXU"):
            if one.address not in tables:
                raise UnreadableError(f"{one}: its targets are not known")
            nexts = [*(position(at, one, target) for target in tables[one.address]), *conditional]
        elif one.opcode in ("EXIT", "RET"):
            nexts = conditional
        elif one.opcode == "WARPSYNC" and "COLLECTIVE" in one.modifiers:
            nexts = [position(at, one, branch_target(one)), *following]
        elif one.opcode in ("JMP", "JMX", "JMXU", "RPCMOV", "BMOV") or (
            one.opcode == "CALL" and one.modifiers[0] not in ("REL", "ABS")
        ):
            raise UnreadableError(f"{one}: where it leads is not known")
        else:
            nexts = following
        edges.append(list(dict.fromkeys(nexts)))

    called = {i: position(at, one, branch_target(one)) for i, one in enumerate(code) if one.name.startswith("CALL.REL")}
    for entry in {0, *called.values()}:
        check_meeting_points(code, edges, entry, at)
    returns: dict[int, list[int]] = {}
    for entry in set(called.values()):
        for i in reachable(edges, entry):
            if code[i].opcode == "RET":
                returns.setdefault(i, []).extend(call + 1 for call, target in called.items() if target == entry)
    for i, sites in returns.items():
        edges[i] = [*dict.fromkeys([*edges[i], *sites])]
    for i, entry in called.items():
        edges[i] = [entry, i + 1] if code[i].guard else [entry]
    return edges


def reachable(edges: Edges, start: int) -> set[int]:
    found, waiting = {start}, [start]
    while waiting:
        new = set(edges[waiting.pop()]) - found
        found |= new
        waiting.extend(new)
    return found


Points = frozenset[tuple[str, int]]  # barrier registers with the place where they let go on


def check_meeting_points(code: Sequence[Instruction], edges: Edges, entry: int, at: Mapping[int, int]) -> None:
    """Raises UnreadableError unless every BSYNC is just before the place that the BSSYs that can lead to it name."""

    def step(i: int, _: int, points: Points) -> Points:
        one = code[i]
        if one.opcode not in ("BSSY", "BSYNC") or one.guard:
            return points | opened(one)
        return frozenset(point for point in points if point[0] != one.operands[0]) | opened(one)

    def opened(one: Instruction) -> Points:
        return frozenset({(one.operands[0], position(at, one, branch_target(one)))} if one.opcode == "BSSY" else ())

    start: Points = frozenset()
    before = solve(edges, start, step, lambda a, b: a | b, entry)
    for i, points in enumerate(before):
        others = {place for barrier, place in points or () if barrier in code[i].operands[:1]} - {i + 1}
        if code[i].opcode == "BSYNC" and others:
            raise UnreadableError(f"{code[i]}: a BSSY before it names another place")


def position(at: Mapping[int, int], branch: Instruction, target: int | None) -> int:
    if target is None or target not in at:
        raise UnreadableError(f"{branch}: its target is not an instruction of the kernel")
    return at[target]


def solve(
    edges: Edges,
    state: State,
    step: Callable[[int, int, State], State],
    join: Callable[[State, State], State],
    entry: int = 0,
) -> list[State | None]:
    """What holds before every instruction, joined over all paths from the entry, where `state` does; None: no path.

    `step(i, j, state)` is what holds before j if i is executed in `state` and j comes next. `join` must not lose
    anything and, repeated, must come to an end.
    """
    before: list[State | None] = [None] * len(edges)
    before[entry] = state
    waiting = [entry]  # a heap: in the order of the code, most is settled before what follows it is looked at
    while waiting:
        i = heapq.heappop(waiting)
        while waiting and waiting[0] == i:
            heapq.heappop(waiting)
        holds = before[i]
        assert holds is not None
        for j in edges[i]:
            reached = step(i, j, holds)
            known = before[j]
            joined = reached if known is None else join(known, reached)
            if joined != known:
                before[j] = joined
                heapq.heappush(waiting, j)
    return before
