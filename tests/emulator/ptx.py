"""From PTX, as Triton writes it, to the instructions that ``emulator.h`` declares.

``parse(text, name)`` gives a kernel's code, registers, constants and parameters. An instruction
that the emulator does not have raises ``UnknownInstruction``, so that none is run wrongly.
"""

import ctypes
import re
from dataclasses import dataclass
from typing import Any

MOST_VALUES = 8


class Instruction(ctypes.Structure):
    """``Instruction`` of ``emulator.h``."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("operation", "type", "from_")),
        *((name, ctypes.c_int32) for name in ("predicate", "negated", "n_results", "n_sources")),
        ("results", ctypes.c_int32 * MOST_VALUES),
        ("sources", ctypes.c_int32 * (MOST_VALUES + 1)),
        *((name, ctypes.c_int32) for name in ("width", "flags", "mode", "line")),
        ("immediate", ctypes.c_int64),
    ]


class UnknownInstruction(Exception):
    """PTX that the emulator does not know."""


@dataclass
class Parameter:
    """A kernel's parameter: where it lies in the block of parameters."""

    name: str
    offset: int
    size: int


@dataclass
class Kernel:
    """A parsed kernel.

    Attributes:
        code: Its instructions.
        n_registers: How many registers they use.
        constants: Values by the register that holds each from the start.
        parameters: In the order of the kernel's arguments.
        places: Line of the source, as "file:line", by line of the PTX, from Triton's debug
            information.
    """

    code: list[Instruction]
    n_registers: int
    constants: dict[int, int]
    parameters: list[Parameter]
    places: dict[int, str]


#: As in ``emulator.h``.
COMPARISONS = {
    name: i
    for i, name in enumerate(
        "eq ne lt le gt ge lo ls hi hs equ neu ltu leu gtu geu num nan".split()
    )
}
FLUSH, APPROXIMATE, TO_ZERO, DOWN, UP, KEEP_NAN, FULL_RANGE = (1 << k for k in range(7))
MODIFIERS = {
    "ftz": FLUSH, "approx": APPROXIMATE, "full": APPROXIMATE | FULL_RANGE, "rzi": TO_ZERO,
    "rmi": DOWN, "rpi": UP, "NaN": KEEP_NAN,
}  # fmt: skip
#: What else an opcode may be made of. Hints for caches and scopes of memory mean nothing here, as
#: memory is sequentially consistent; every rounding of float32 and float64 is to the nearest.
IGNORED = set(
    "rn rni sync aligned relaxed acquire release acq_rel gpu cta sys global shared param cg ca cs "
    "lu wt cv wb cluster uni x1 x2 x4 m8n8 trans lo hi wide to L1 nc evict_first evict_last "
    "evict_normal L2 no_allocate L1::evict_first L1::evict_last L1::evict_normal "
    "L1::no_allocate shared::cta volatile v2 v4 v8 add max bfly up down idx".split()
)
SHUFFLES = ("bfly", "up", "down", "idx")
SPECIAL = {
    f"%{name}.{axis}": 3 * i + j
    for i, name in enumerate(("tid", "ctaid", "nctaid", "ntid"))
    for j, axis in enumerate("xyz")
} | {"%laneid": 12, "%warpid": 13}
#: Statements that declare or describe.
DECLARATIONS = (".reg", ".pragma", ".section", ".file", ".local", ".shared")


class Parser:
    """Reads one kernel. ``operations`` and ``types`` are the emulator's numbers, by name."""

    def __init__(self, operations: dict[str, int], types: dict[str, int]):
        self._operations, self._types = operations, types
        self._registers: dict[Any, int] = {}
        self._constants: dict[int, int] = {}
        self._labels: dict[str, int] = {}
        self._branches: list[tuple[Instruction, str]] = []
        self._scoped: set[str] = set()  # registers declared in inline assembly, without a "%"
        self._offsets: dict[str, int] = {}  # of parameters
        self._code: list[Instruction] = []

    def parse(self, text: str, name: str) -> Kernel:
        head = re.search(rf"\.entry\s+{re.escape(name)}\s*\((.*?)\)[^{{]*?\n\{{", text, re.S)
        if head is None:
            raise UnknownInstruction(f"no kernel {name!r}")
        parameters, at = [], 0
        for kind, parameter in re.findall(r"\.param\s+\.(\w+)[^,]*?(\w+_param_\d+)", head[1]):
            size = int(kind[1:]) // 8
            at = -(-at // size) * size
            self._offsets[parameter] = at
            parameters.append(Parameter(parameter, at, size))
            at += size
        files = dict(re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', text, re.M))
        places, place = {}, ""
        first = text[: head.end()].count("\n") + 1
        body = text[head.end() : text.index("\n}", head.end())]
        for number, line in enumerate(body.split("\n"), first):
            line = line.partition("//")[0].strip()
            if found := re.match(r"\.loc\s+(\d+)\s+(\d+)", line):
                place = f"{files.get(found[1], '?').rpartition('/')[2]}:{found[2]}"
                continue
            places[number] = place
            for statement in line.split(";"):
                self._statement(statement.strip(), number)
        for instruction, label in self._branches:
            instruction.immediate = self._labels[label]
        constants = {register: value for value, register in self._constants.items()}
        return Kernel(self._code, len(self._registers), constants, parameters, places)

    # --- statements ---

    def _statement(self, text: str, line: int) -> None:
        while label := re.match(r"(\$?[\w$]+):\s*", text):
            self._labels[label[1]] = len(self._code)
            text = text[label.end() :]
        text = text.lstrip("{").strip() if text.startswith("{") else text  # inline assembly
        if text.startswith(".reg"):
            names = text.split(None, 2)[2]
            self._scoped |= {name.strip() for name in names.split(",") if "%" not in name}
        elif text and text != "}" and not text.startswith(DECLARATIONS):
            self._code.append(self._instruction(text, line))

    def _instruction(self, text: str, line: int) -> Instruction:
        found = Instruction(predicate=-1, width=1, line=line)
        whole = text
        if guard := re.match(r"@(!?)([%\w]+)\s+", text):
            found.predicate, found.negated = self._register(guard[2]), bool(guard[1])
            text = text[guard.end() :]
        opcode, _, rest = text.replace("\t", " ").partition(" ")
        # commas within {...} and [...] separate no operands
        operands = [x.strip() for x in re.split(r",(?![^{]*\})(?![^\[]*\])", rest) if x.strip()]
        kind, *words = opcode.split(".")
        types = [self._types[word] for word in words if word in self._types]
        if types:
            found.type, found.from_ = types[0], types[-1]
        for word in words:
            found.flags |= MODIFIERS.get(word, 0)
            known = word in MODIFIERS or word in self._types or word in IGNORED
            if not known and not (kind == "setp" and word in COMPARISONS):
                raise UnknownInstruction(f"line {line}: {whole}")
        try:
            read = getattr(self, f"_read_{kind}", self._read_plain)
            read(found, kind, words, operands)
        except (KeyError, IndexError, StopIteration) as error:
            raise UnknownInstruction(f"line {line}: {whole}") from error
        return found

    # --- operands ---

    def _register(self, name: Any) -> int:
        return self._registers.setdefault(name, len(self._registers))

    def _operand(self, text: str) -> int:
        """The register of an operand; constants get one, what is not wanted has none."""
        if text.startswith("%") or text in self._scoped:
            return self._register(text)
        if text == "_":
            return -1
        if found := re.fullmatch(r"0f([0-9a-fA-F]{8})|0d([0-9a-fA-F]{16})", text):
            value = int(found[1] or found[2], 16)
        elif re.fullmatch(r"-?\d+", text):
            value = int(text)
        elif re.fullmatch(r"-?0x[0-9a-fA-F]+U?", text):
            value = int(text.rstrip("U"), 16)
        elif text == "global_smem":  # shared memory starts there
            value = 0
        elif text in ("true", "false"):
            value = text == "true"
        else:
            raise KeyError(text)
        value &= (1 << 64) - 1
        return self._constants.setdefault(value, self._register(("constant", value)))

    def _address(self, found: Instruction, text: str) -> str:
        """Notes the offset of ``[base + offset]``, and gives the base."""
        parts = re.fullmatch(r"\[\s*(%\w+|\w+)\s*(?:\+\s*(-?\d+))?\s*\]", text)
        if parts is None:
            raise KeyError(text)
        found.immediate = int(parts[2] or 0)
        return parts[1]

    def _set(self, found: Instruction, operation: str, results: list[str], sources: list[str]):
        found.operation = self._operations[operation]
        found.n_results, found.n_sources = len(results), len(sources)
        for i, name in enumerate(results):
            found.results[i] = self._operand(name)
        for i, name in enumerate(sources):
            found.sources[i] = self._operand(name)

    # --- opcodes: `_read_plain`, and those whose operands are of another form ---

    def _read_plain(self, found, kind, words, operands):
        """``kind destination, sources``; a destination may be two: ``d|p``."""
        if "s16x2" in words and kind != "add":
            raise KeyError(kind)
        form = next((word for word in ("lo", "hi", "wide") if word in words), None)
        name = f"{kind}_{form}" if kind in ("mul", "mad") and form else kind
        self._set(found, name, operands[0].split("|"), operands[1:])

    def _read_mov(self, found, kind, words, operands):
        into, of = operands
        if into.startswith("{"):
            self._set(found, "unpack", _group(into), [of])
        elif of.startswith("{"):
            self._set(found, "pack", [into], _group(of))
        elif of in SPECIAL:
            self._set(found, "special", [into], [])
            found.immediate = SPECIAL[of]
        else:
            self._set(found, "mov", [into], [of])

    def _read_ld(self, found, kind, words, operands):
        into = _group(operands[0])
        base = self._address(found, operands[1])
        found.width = len(into)
        space = _space(words)
        if space == "param":
            offset = found.immediate + self._offsets[base]
            self._set(found, "ld_param", into, [])
            found.immediate = offset
        else:
            self._set(found, f"ld_{space}", into, [base])

    def _read_st(self, found, kind, words, operands):
        values = _group(operands[1])
        found.width = len(values)
        base = self._address(found, operands[0])
        self._set(found, f"st_{_space(words)}", [], [base, *values])

    def _read_ldmatrix(self, found, kind, words, operands):
        into = _group(operands[0])
        found.width, found.mode = len(into), "trans" in words
        self._set(found, kind, into, [self._address(found, operands[1])])

    def _read_stmatrix(self, found, kind, words, operands):
        values = _group(operands[1])
        found.width, found.mode = len(values), "trans" in words
        self._set(found, kind, [], [self._address(found, operands[0]), *values])

    def _read_atom(self, found, kind, words, operands):
        if "add" not in words or _space(words) != "global":
            raise KeyError(kind)
        base = self._address(found, operands[1])
        self._set(found, "atom_add", [operands[0]], [base, operands[2]])

    def _read_red(self, found, kind, words, operands):
        """As ``atom``, where nobody wants what was there."""
        if "add" not in words or _space(words) != "global":
            raise KeyError(kind)
        base = self._address(found, operands[0])
        self._set(found, "atom_add", [], [base, operands[1]])

    def _read_setp(self, found, kind, words, operands):
        found.mode = COMPARISONS[words[0]]
        self._set(found, "setp", [operands[0]], operands[1:])

    def _read_shfl(self, found, kind, words, operands):
        found.mode = next(i for i, word in enumerate(SHUFFLES) if word in words)
        self._set(found, "shfl", operands[0].split("|"), operands[1:4])  # not the lanes' mask

    def _read_redux(self, found, kind, words, operands):
        what = next(word for word in words if word in ("add", "max"))
        self._set(found, f"redux_{what}", operands[:1], operands[1:2])  # not the lanes' mask

    def _read_bra(self, found, kind, words, operands):
        self._set(found, "bra", [], [])
        self._branches.append((found, operands[0]))

    def _read_bar(self, found, kind, words, operands):
        if operands not in (["0"], []):  # one of several barriers
            raise KeyError(kind)
        self._set(found, "bar", [], [])

    _read_barrier = _read_bar

    def _read_fence(self, found, kind, words, operands):
        self._set(found, "fence", [], [])

    _read_membar = _read_fence

    def _read_ret(self, found, kind, words, operands):
        self._set(found, "ret", [], [])


def _group(text: str) -> list[str]:
    """The members of ``{a, b}``, or what stands alone."""
    return [x.strip() for x in text.strip("{} ").split(",")]


def _space(words: list[str]) -> str:
    spaces = (word.split("::")[0] for word in words)
    return next(space for space in spaces if space in ("global", "shared", "param"))
