"""What registers and predicates of a kernel hold at a place, as far as moves, sums and comparisons of integers tell.

Enough to see that a branch on "has there been a step before?" is not taken in the first step.
"""

import re
from collections.abc import Mapping

from tools.sass.flow import Instruction, width

Range = tuple[int, int]  # the least and the most of a 32-bit signed integer; of a predicate 0 or 1
Values = Mapping[str, Range]  # by name, such as R4, UR6, P0; what is missing is unknown

MOST = 2**31 - 1
IS_CLUSTER = "c[0x0][0x140]"  # where cluster barriers look whether a kernel was launched in clusters, as it must be
COMPARISONS = {"LT", "LE", "GT", "GE", "EQ", "NE"}


def value(values: Values, operand: str) -> Range | None:
    operand = operand.removesuffix(".reuse")
    if operand in ("RZ", "URZ"):
        return 0, 0
    if operand in ("PT", "UPT"):
        return 1, 1
    if re.fullmatch(r"-?0x[0-9a-f]+", operand):
        number = (int(operand, 16) + 2**31) % 2**32 - 2**31
        return number, number
    if operand[:1] in ("-", "!"):
        known = value(values, operand[1:])
        shift = 1 if operand[0] == "!" else 0
        return known and (shift - known[1], shift - known[0])
    return values.get(operand)


def truth(values: Values, predicate: str) -> bool | None:
    """Whether a predicate holds; None: unknown. The empty guard always holds."""
    known = value(values, predicate) if predicate else (1, 1)
    return bool(known[0]) if known and known[0] == known[1] else None


def join_ranges(a: Range, b: Range) -> Range | None:
    """A range with both, one of few so that repeated joins come to an end."""
    if a == b:
        return a
    return (0, MOST) if a[0] >= 0 and b[0] >= 0 else None


def join_values(a: Values, b: Values) -> Values:
    joined = {name: join_ranges(known, b[name]) for name, known in a.items() if name in b}
    return {name: known for name, known in joined.items() if known is not None}


def compared(name: str, a: Range, b: Range) -> Range | None:
    if name in ("GT", "GE"):
        return compared({"GT": "LT", "GE": "LE"}[name], b, a)
    if name == "NE":
        equal = compared("EQ", a, b)
        return equal and (1 - equal[1], 1 - equal[0])
    if name == "EQ":
        always, never = a[0] == a[1] == b[0] == b[1], a[1] < b[0] or b[1] < a[0]
    else:
        strict = name == "LT"
        always = a[1] < b[0] or (not strict and a[1] == b[0])
        never = b[1] < a[0] or (strict and b[1] == a[0])
    return (1, 1) if always else (0, 0) if never else None


def result(values: Values, one: Instruction) -> Range | None:
    """What the first operand becomes. Sums are taken not to overflow, as the source's signed ones must not."""
    operands = one.operands
    known = [value(values, operand) for operand in operands]
    if one.name in ("MOV", "UMOV", "R2UR") and len(operands) == 2:
        return known[1]
    if one.name in ("IMAD.MOV.U32", "IMAD.U32", "IMAD.MOV") and operands[1:3] == ("RZ", "RZ"):
        return known[3]
    if one.name == "PLOP3.LUT" and operands[1:4] == ("PT", "PT", "PT") and operands[5:] == ("0x80", "0x0"):
        return known[4]
    if one.name in ("SEL", "USEL") and len(operands) == 4:
        chosen = truth(values, operands[3])
        if chosen is not None:
            return known[1] if chosen else known[2]
        return join_ranges(known[1], known[2]) if known[1] and known[2] else None
    if one.name == "LDC" and operands[1] == IS_CLUSTER:
        return 1, 1
    if one.opcode in ("ISETP", "UISETP") and len(one.modifiers) in (2, 3) and len(operands) == 5:
        comparison, *unsigned, combined = one.modifiers
        left, right = known[2:4]
        comparable = left and right and comparison in COMPARISONS and (not unsigned or min(left[0], right[0]) >= 0)
        holds = compared(comparison, left, right) if left and right and comparable else None
        decided = {"AND": (0, 0), "OR": (1, 1)}.get(combined)  # by either side; otherwise it takes both
        if decided and decided in (holds, known[4]):
            return decided
        return holds if decided and holds == known[4] else None
    terms: list[Range | None] = []
    if (one.name, len(operands)) in (("IADD3", 4), ("UIADD3", 4), ("VIADD", 3)):
        terms = known[1:]
    elif one.name == "IMAD.IADD" and operands[2] == "0x1":
        terms = [known[1], known[3]]
    sure = [term for term in terms if term is not None]
    if not terms or len(sure) < len(terms):
        return None
    return max(sum(term[0] for term in sure), -MOST - 1), min(sum(term[1] for term in sure), MOST)


def written(one: Instruction) -> set[str]:
    """Registers and predicates that the instruction may write, general registers of HGMMAs apart."""
    names = {operand for operand in one.operands[:3] if re.fullmatch(r"U?P\d", operand)}
    if re.search(r"SETP2?$|PLOP3$|^FCHK$", one.opcode):
        return names  # what follows the predicates is only read
    first = next((operand for operand in one.operands if not re.fullmatch(r"U?P[\dT]", operand)), "")
    found = re.fullmatch(r"(U?R)(\d+)", first)
    if found:
        count = 128 if one.opcode == "HGMMA" else width(one)
        names |= {f"{found[1]}{int(found[2]) + i}" for i in range(count)}
    return names


def after(values: Values, one: Instruction) -> Values:
    executed = truth(values, one.guard)
    if executed is False:
        return values
    if one.opcode in ("CALL", "RET", "R2P"):
        return {}
    names = written(one)
    if not names:
        return values
    changed = {name: known for name, known in values.items() if name not in names}
    known = result(values, one)
    if known is not None:
        changed[one.operands[0]] = known
    return changed if executed else join_values(values, changed)
