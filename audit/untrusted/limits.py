"""What a child process that parses strangers' bytes may take, and what it may answer."""

from __future__ import annotations

from dataclasses import dataclass

MEMORY_BYTES = 2 * 1024**3  # private memory of a child
ADDRESS_BYTES = 4 * 1024**3  # its whole address space
CPU_SECONDS = 60  # of an item
LIFE_CPU_SECONDS = 1800  # of a child, over all its items
WALL_SECONDS = 120  # of an item
MAX_OPEN_FILES = 64
MAX_WRITTEN_BYTES = 512 * 1024**2  # of a file, which only the shared memory of the answer is
MAX_ANSWER_BYTES = 96 * 1024**2  # of JSON
MAX_ANSWER_VALUES = 4_000_000  # in an answer's JSON
MAX_CHILDREN = 4
ITEMS_OF_A_CHILD = 2000  # then a fresh one takes its place
MAX_GROWTH_BYTES = 512 * 1024**2  # of a child's resident memory between items: then the same


@dataclass(frozen=True)
class ChildLimits:
    """Limits of one child: bytes, seconds of an item, numbers of open files and of items."""

    memory: int = MEMORY_BYTES
    address: int = ADDRESS_BYTES
    cpu: int = CPU_SECONDS
    life_cpu: int = LIFE_CPU_SECONDS
    wall: float = WALL_SECONDS
    open_files: int = MAX_OPEN_FILES
    written: int = MAX_WRITTEN_BYTES
    answer: int = MAX_ANSWER_BYTES
    values: int = MAX_ANSWER_VALUES
    items: int = ITEMS_OF_A_CHILD
    growth: int = MAX_GROWTH_BYTES
