"""Memory traffic and collectives, read off the text of a program that XLA compiled.

Every instruction of the entry computation reads its operands from memory and writes its result there, once.
Batch norm is bound by exactly that, and the count is the same on every run and every machine.
"""

import dataclasses
import math
import re

BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
BYTES |= {"s64": 8, "u64": 8, "f64": 8, "c64": 8}
NOTHING_MOVES = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "copy-done", "slice-done"}
SLICES = {"slice", "dynamic-slice", "gather"}
SEES_THROUGH = {"convert", "bitcast", "reshape"}
LIBRARY = {"custom-call", "convolution"}
COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute")


@dataclasses.dataclass
class Instruction:
    name: str
    shape: str
    operation: str
    operands: list[str]
    called: list[str]

    @property
    def size(self):
        return size(self.shape)


def size(shape):
    """Bytes of a shape such as `(f32[8,4]{1,0}, pred[])`."""
    parts = re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shape)
    return sum(BYTES.get(kind, 0) * math.prod(int(n) for n in dims.split(",") if n) for kind, dims in parts)


def computations(program):
    """All computations of the program, as lists of instructions; the entry is under ""."""
    found = {}
    for entry, name, body in re.findall(
        r"^(ENTRY )?%?([\w.\-]+) \(.*?\) -> .*? \{\n(.*?)^\}", program, re.MULTILINE | re.DOTALL
    ):
        found["" if entry else name] = [one for line in body.splitlines() if (one := instruction(line))]
    return found


def instruction(line):
    found = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*?)\)(.*)", line)
    if found is None:
        return None
    name, shape, operation, operands, rest = found.groups()
    called = re.findall(r"(?:calls|to_apply|_computation)=%?([\w.\-]+)", rest)
    for branches in re.findall(r"branch_computations=\{(.*?)\}", rest):
        called += re.findall(r"[\w.\-]+", branches)
    return Instruction(name, shape, operation, re.findall(r"[\w.\-]+", operands), called)


def moved(program, library=True):
    """Bytes read and written, with or without convolutions and what else is done by library calls.

    Of operands that a fusion only slices, the slices count. Of the branches of a conditional, the cheapest
    counts: a layer takes the dear one on rare occasions.
    """
    parts = computations(program)

    def of(computation):
        sizes, total = {}, 0
        for one in parts[computation]:
            sizes[one.name] = one.size
            if one.operation in NOTHING_MOVES or (one.operation in LIBRARY and not library):
                continue
            if one.operation in ("conditional", "call"):
                total += min(of(branch) for branch in one.called)
            elif one.operation in SLICES:
                total += 2 * one.size
            else:
                read = sliced(parts[one.called[0]]) if one.operation == "fusion" else {}
                known = [name for name in one.operands if name in sizes]
                total += one.size + sum(read.get(i, sizes[name]) for i, name in enumerate(known))
        return total

    return of("")


def sliced(computation):
    """The bytes that are read of each parameter of which only slices are: {index: bytes}."""

    def read(name):
        total = 0
        for user in computation:
            if name not in user.operands:
                continue
            part = user.size if user.operation in SLICES else None
            part = read(user.name) if user.operation in SEES_THROUGH else part
            if part is None:
                return None
            total += part
        return total

    sizes = {int(one.operands[0]): read(one.name) for one in computation if one.operation == "parameter"}
    return {index: part for index, part in sizes.items() if part is not None}


def collectives(program):
    """(operation, bytes of its operands) of each collective, of which some start and end in two steps."""
    found = []
    for computation in computations(program).values():
        sizes = {one.name: one.size for one in computation}
        for one in computation:
            kind = one.operation.removesuffix("-start")
            if kind in COLLECTIVES:
                found.append((kind, sum(sizes.get(name, 0) for name in one.operands)))
    return found
