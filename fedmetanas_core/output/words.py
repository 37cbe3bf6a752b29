"""A genotype as checked values, and as a few plain lines of text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedmetanas_core.errors import RefusalError

NUM_INPUTS = 2  # a cell sees the outputs of the two cells before it
CELL_NAMES = {
    "normal": "normal cell",
    "reduce": "reduction cell",
    "personal_normal": "personal normal cell",
    "personal_reduce": "personal reduction cell",
}


@dataclass(frozen=True)
class Cell:
    """One cell: `nodes[i]` lists the (operation, source) pairs summed by node i; source 2 + i is node i."""

    name: str
    nodes: tuple[tuple[tuple[str, int], ...], ...]
    concat: tuple[int, ...]


def source_name(source: int) -> str:
    """What a cell's source is called: its two inputs, then its nodes counted from 1."""
    return ("c_{k-2}", "c_{k-1}")[source] if source < NUM_INPUTS else f"node {source - NUM_INPUTS + 1}"


def cells_of(genotype: Mapping[str, object]) -> tuple[Cell, ...]:
    """The cells of a genotype's JSON form, the normal and the reduction cell first. RefusalError if it is malformed."""
    keys = [key for key in CELL_NAMES if not key.startswith("personal") or key in genotype]
    return tuple(_cell(genotype, key, CELL_NAMES[key]) for key in keys)


def _cell(genotype: Mapping[str, object], key: str, name: str) -> Cell:
    given = _items(genotype.get(key), f"its {key!r}")
    if not given:
        raise _malformed(f"its {key!r} has no nodes")
    nodes = []
    for index, entries in enumerate(given):
        where = f"node {index + 1} of its {key!r}"
        nodes.append(tuple(_edge(entry, index, where) for entry in _items(entries, where)))
    concat = tuple(_items(genotype.get("concat"), "its 'concat'"))
    sources = [_source(entry, NUM_INPUTS + len(nodes), "its 'concat'") for entry in concat]
    if not sources:
        raise _malformed("its 'concat' is empty")
    return Cell(name, tuple(nodes), tuple(dict.fromkeys(sources)))


def _edge(entry: object, index: int, where: str) -> tuple[str, int]:
    pair = _items(entry, f"an input of {where}")
    if len(pair) != 2 or not isinstance(pair[0], str) or not pair[0]:
        raise _malformed(f"an input of {where} is not an [operation, source] pair")
    return pair[0], _source(pair[1], NUM_INPUTS + index, where)


def _source(value: object, limit: int, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < limit:
        raise _malformed(f"{where} names the source {value!r}, which is not one of 0 to {limit - 1}")
    return value


def _items(value: object, where: str) -> Sequence[object]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise _malformed(f"{where} is missing or not a list")
    return value


def _malformed(reason: str) -> RefusalError:
    return RefusalError(f"the genotype is malformed: {reason}", "give a genotype.json that a run wrote")


def genotype_in_words(genotype: Mapping[str, object]) -> str:
    """The two cells, a line for every node and one for the output; no trailing newline. Raises RefusalError."""
    lines = []
    for cell in cells_of(genotype):
        lines.append(cell.name)
        for number, edges in enumerate(cell.nodes, start=1):
            terms = " + ".join(f"{operation}({source_name(source)})" for operation, source in edges)
            lines.append(f"  node {number} = {terms or 'nothing'}")
        lines.append(f"  c_{{k}} = concat({', '.join(source_name(source) for source in cell.concat)})")
    return "\n".join(lines)
