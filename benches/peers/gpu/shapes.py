"""What a row of our table is, read from its name: the same work for everybody."""

import dataclasses
import re


@dataclasses.dataclass(frozen=True)
class Dense:
    rows: int
    n: int
    k: int


@dataclasses.dataclass(frozen=True)
class Product:
    experts: int
    rows: int  # of each expert
    n: int
    k: int


@dataclasses.dataclass(frozen=True)
class Layer:
    tokens: int
    hidden: int
    intermediate: int
    experts: int
    top_k: int


@dataclasses.dataclass(frozen=True)
class Route:
    tokens: int
    experts: int
    top_k: int


@dataclasses.dataclass(frozen=True)
class Sort:
    tokens: int
    experts: int
    top_k: int


@dataclasses.dataclass(frozen=True)
class Rows:
    tokens: int
    hidden: int
    top_k: int


@dataclasses.dataclass(frozen=True)
class Combine:
    tokens: int
    hidden: int
    top_k: int


@dataclasses.dataclass(frozen=True)
class Copy:
    bytes: int


PATTERNS = [
    (r"grouped_gemm/(\d+)x(\d+)/(\d+)x(\d+)", Product),
    (r"moe/(\d+)/H(\d+)-I(\d+)-E(\d+)-K(\d+)", Layer),
    (r"routing/(\d+)/E(\d+)-K(\d+)", Route),
    (r"permute/(\d+)/E(\d+)-K(\d+)", Sort),
    (r"rows/(\d+)/H(\d+)-K(\d+)", Rows),
    (r"combine/(\d+)/H(\d+)-K(\d+)", Combine),
]


def parse(name):
    """The work of a row of our table."""
    if name == "ceiling/copy":
        return Copy(2 << 30)
    if name == "ceiling/dense":
        return Dense(8192, 8192, 8192)
    for pattern, kind in PATTERNS:
        match = re.fullmatch(pattern, name)
        if match:
            return kind(*map(int, match.groups()))
    raise ValueError(f"a row that this file does not know: {name}")


def tiny(work):
    """The same kind of work, small enough for a CPU."""
    small = {"tokens": 6, "rows": 5, "hidden": 32, "intermediate": 16, "experts": 4, "top_k": 2, "n": 24, "k": 32, "bytes": 4096}
    return dataclasses.replace(work, **{f.name: min(small[f.name], getattr(work, f.name)) for f in dataclasses.fields(work)})
