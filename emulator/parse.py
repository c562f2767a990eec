"""PTX text -> Program: the instructions of the one entry point, its parameters, labels and registers.

It understands only PTX that Triton and Gluon write, including the `{ .reg ...; label: ... }` scopes of inline assembly.
Anything else is an error, never a guess.
"""

import re
from dataclasses import dataclass, field

from emulator.errors import EmulatorError

BITS = {"pred": 1, "b8": 8, "b16": 16, "b32": 32, "f32": 32, "b64": 64, "f64": 64}
IGNORED = ("loc", "file", "pragma")


@dataclass(eq=False)
class Scope:
    """Names declared between one pair of braces. Registers are numbered through the whole program."""

    slots: list  # one entry for each register of the program: its bits
    parent: "Scope | None" = None
    registers: dict = field(default_factory=dict)
    families: dict = field(default_factory=dict)  # %r<70> declares %r0 .. %r69
    labels: dict = field(default_factory=dict)  # -> index of the next instruction

    def declare(self, bits, names):
        for name in names:
            family = re.fullmatch(r"(.+)<\d+>", name)
            if family:
                self.families[family[1]] = bits
            else:
                self._new(name, bits)

    def register(self, name):
        """-> (number, bits) or None if no such register is declared."""
        prefix = name.rstrip("0123456789")
        if name not in self.registers and prefix != name and prefix in self.families:
            self._new(name, self.families[prefix])
        if name in self.registers:
            return self.registers[name], self.slots[self.registers[name]]
        return self.parent and self.parent.register(name)

    def label(self, name):
        if name in self.labels:
            return self.labels[name]
        if self.parent is None:
            raise EmulatorError(f"no label {name}")
        return self.parent.label(name)

    def _new(self, name, bits):
        self.registers[name] = len(self.slots)
        self.slots.append(bits)


@dataclass(frozen=True, eq=False)
class Instruction:
    text: str
    predicate: str | None
    negated: bool
    op: str
    mods: tuple  # "ld.global.v4.b32" -> ("global", "v4", "b32")
    args: tuple
    scope: Scope


class Program:
    def __init__(self, ptx):
        ptx = re.sub(r"//.*", "", ptx)
        entry = re.search(r"\.visible \.entry (\w+)\((.*?)\)\s*(.*?)\{", ptx, re.S)
        self.name = entry[1]
        self.parameters = [_parameter(text) for text in entry[2].split(",") if text.strip()]
        self.threads = int(re.search(r"\.reqntid (\d+)", entry[3])[1])
        self.slots = []
        self.instructions = []
        self.targets = {}  # label of a .branchtargets list -> its labels
        self._parse(ptx, entry.end())

    def _parse(self, ptx, at):
        scope, last_label = Scope(self.slots), None
        while True:
            at = re.compile(r"\s*").match(ptx, at).end()
            if ptx[at] == "{":
                scope = Scope(self.slots, scope)
                at += 1
            elif ptx[at] == "}":
                scope = scope.parent
                at += 1
                if scope is None:
                    return
            elif directive := re.compile(rf"\.(?:{'|'.join(IGNORED)})\b[^\n]*").match(ptx, at):
                at = directive.end()
            elif label := re.compile(r"([$\w]+):(?!:)").match(ptx, at):
                last_label = label[1]
                scope.labels[last_label] = len(self.instructions)
                at = label.end()
            else:
                end = ptx.index(";", at)
                self._statement(ptx[at:end].strip(), scope, last_label)
                at = end + 1

    def _statement(self, text, scope, last_label):
        if not text:
            return
        if text.startswith(".reg"):
            kind, names = re.match(r"\.reg\s+\.(\w+)\s+(.*)", text, re.S).groups()
            scope.declare(BITS[kind.replace("u", "b").replace("s", "b")], [n.strip() for n in names.split(",")])
        elif text.startswith(".branchtargets"):
            self.targets[last_label] = [n.strip() for n in text.removeprefix(".branchtargets").split(",")]
        elif not text.startswith((".local", ".shared")):
            predicate, op, args = re.match(r"(?:@(!?\s*[%\w]+)\s+)?([\w.:]+)\s*(.*)", text, re.S).groups()
            op, *mods = op.replace("::", "#").split(".")
            name = predicate.lstrip("! ") if predicate else None
            negated = bool(predicate) and predicate.startswith("!")
            mods = tuple(mod.replace("#", "::") for mod in mods)
            self.instructions.append(
                Instruction(" ".join(text.split()), name, negated, op, mods, split_operands(args), scope)
            )


def _parameter(text):
    """-> (name, "map" for the 128 bytes of a tensor map, else the type, for example "u64")."""
    name, size = re.search(r"(\w+)(?:\[(\d+)\])?\s*$", text).groups()
    return name, "map" if size == "128" else re.search(r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)", text)[1]


def split_operands(text):
    """Split a text at the commas outside all brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "{[(") - (character in "}])")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return tuple(part.strip() for part in parts if part.strip())
