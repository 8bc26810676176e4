"""What one module's tensors add to a sketch, algorithm by algorithm: p^T dW q, or the same in a space of its own.

Formulas are those of ``formats.algorithms``. No change is made whole where its factors do: of U D it is (p^T U)(D q), a
CP decomposition is U times its core and inner factor, a product of two low-rank changes element by element has the
products of their columns for factors (Khatri-Rao), and a Kronecker product is taken factor by factor.

What needs the base's weights is sketched as what it is, in a space of its own, so that it is near to its like alone:
rotations by their generators Q (half of R - I, to first order), scales less one, GLoRA's mixing of the inputs. What
mostly is a part of the base has none: PiSSA's and OLoRA's factors, T-LoRA without its beginning, DoRA's magnitudes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from audit.models.families.spelling import Place
from audit.models.formats.names import Algorithm, Group
from audit.models.formats.scaling import Scaling
from audit.models.sketches.reader import MOST_ELEMENTS, Reader
from audit.models.sketches.signs import of_inputs, of_outputs, of_shared_inputs

LONGEST_SIDE = 1 << 15
MOST_RANK = 4096
_SLOW = 8  # a product with one column waits for memory
Values = Mapping[str, np.ndarray]
_FLAGS = ("alpha", "on_input", "scaled")


def entry(group: Group, read: Reader, scaling: Scaling, place: Place) -> np.ndarray | None:
    """float64 [SIZE]: what the group adds; None where it has no sketch.

    Raises ValueError, IndexError or KeyError where its tensors do not fit each other.
    """
    if scaling.start is not None:  # the factors are mostly what was taken from the base
        return None
    values = {}
    for role, name in group.tensors.items():
        value = read.get(name) if role not in _FLAGS else _flag(role, name, read)
        if value is None:
            return None
        values[role] = value
    made = _BY_ALGORITHM[group.algorithm](_Module(group, place, scaling, values))
    found = None
    for one in made:
        if one is None:
            return None
        found = one if found is None else found + one
    return found


def work(group: Group, read: Reader) -> int:
    """Multiplications for one number of the sketch, about."""
    sizes = {role: read.info[name].shape for role, name in group.tensors.items()}
    elements = sum(math.prod(shape) for shape in sizes.values())
    if group.algorithm is Algorithm.loha:
        rank = math.prod(sizes["hada_w1_b"][:1])
        outputs = math.prod(sizes["hada_w1_a"]) // max(rank, 1)
        inputs = math.prod(sizes["hada_w1_b"][1:]) * math.prod(sizes.get("hada_t1", ())[2:])
        return elements + min(outputs * inputs * (1 if "hada_t1" in sizes else rank), rank * rank * (outputs + inputs))
    if group.algorithm is Algorithm.lokr:
        (first_out, first_in), (second_out, second_in) = _kronecker_sides(sizes)
        return elements + first_in * second_out * (_SLOW * first_out + second_in)
    return elements


def _kronecker_sides(sizes: Mapping[str, tuple[int, ...]]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Rows and columns of both factors of LoKr."""
    sides = []
    for name in ("lokr_w1", "lokr_w2"):
        if name in sizes:
            shape = sizes[name]
            sides.append((math.prod(shape[:1]), math.prod(shape[1:])))
            continue
        a, b = sizes[f"{name}_a"], sizes[f"{name}_b"]
        core = sizes.get("lokr_t2", ()) if name == "lokr_w2" else ()
        sides.append((math.prod(a[1:] if core else a[:1]), math.prod(b[1:]) * math.prod(core[2:])))
    return sides[0], sides[1]


def _flag(role: str, name: str, read: Reader) -> np.ndarray | None:
    if role == "alpha":
        return read.get(name)
    value = read.flag(name)
    return None if value is None else np.array([float(value)], np.float32)


class _Module:
    """One module's tensors, and its signs."""

    def __init__(self, group: Group, place: Place, scaling: Scaling, values: Values) -> None:
        self.group, self.place, self.scaling, self.values = group, place, scaling, values
        self._signs: tuple[tuple[int, int], np.ndarray, np.ndarray] | None = None

    def signs(self, outputs: int, inputs: int) -> tuple[np.ndarray, np.ndarray]:
        """p and q of a change [outputs, inputs]."""
        if self._signs is None or self._signs[0] != (outputs, inputs):
            made = of_outputs(self.place, outputs, inputs), of_inputs(inputs)
            self._signs = (outputs, inputs), *made
        return self._signs[1:]

    def unfit(self, what: str = "its factors do not fit each other") -> ValueError:
        """The error of tensors that make up nothing."""
        return ValueError(f"{self.group.module[:120]}: {what}")

    def scale(self, rank: int) -> float:
        """alpha / rank, or alpha / sqrt(rank); 1 without alpha."""
        alpha = float(self.values["alpha"].flat[0]) if "alpha" in self.values else self.scaling.of(self.group.module)
        if rank < 1:
            raise self.unfit("it has no rank")
        if not alpha:
            return 1.0
        return alpha / (rank**0.5 if self.scaling.rank_stabilised else rank)

    def product(self, up: np.ndarray, down: np.ndarray, scale: float = 1.0) -> np.ndarray | None:
        """Of scale * up [outputs, r] @ down [r, inputs]."""
        if up.ndim != 2 or down.ndim != 2 or up.shape[1] != len(down):
            raise self.unfit()
        if max(len(up), down.shape[1]) > LONGEST_SIDE or len(down) > MOST_RANK:
            return None
        p, q = self.signs(len(up), down.shape[1])
        return np.asarray(((up.T @ p) * (down @ q)).sum(0, dtype=np.float64) * scale)

    def vector(self, value: np.ndarray, space: str, scale: float = 1.0) -> np.ndarray | None:
        """Of one number an output, such as a bias."""
        if value.size > LONGEST_SIDE:
            return None
        p = of_outputs(self.place, value.size, None, space)
        return np.asarray((value.reshape(-1, 1) * p).sum(0, dtype=np.float64) * scale)

    def on_inputs(self, value: np.ndarray, space: str) -> np.ndarray | None:
        """Of one number an input."""
        if value.size > LONGEST_SIDE:
            return None
        p = of_shared_inputs(self.place, value.size, space)
        return np.asarray((value.reshape(-1, 1) * p).sum(0, dtype=np.float64))

    def bias(self) -> Iterator[np.ndarray | None]:
        """Of a change of the bias that stands beside any algorithm."""
        if "diff_b" in self.values:
            yield self.vector(self.values["diff_b"], "bias")


def _flat(value: np.ndarray) -> np.ndarray:
    return value.reshape(len(value), -1) if value.ndim else value.reshape(1, 1)


def _core(core: np.ndarray, down: np.ndarray) -> np.ndarray:
    """core [i, j, ...] with down [j, inputs]: [i, inputs * ...], in the order of a convolution's weights."""
    fits = core.ndim >= 2 and core.shape[1] == len(down)
    if not fits or core.shape[0] * down.shape[1] * math.prod(core.shape[2:]) > MOST_ELEMENTS:
        raise ValueError(f"a core of {core.shape} does not fit factors of {down.shape}")
    found = np.tensordot(core.reshape(*core.shape[:2], -1), down, axes=([1], [0]))  # [i, k, inputs]
    return found.transpose(0, 2, 1).reshape(len(core), -1)


def _lora(one: _Module) -> Iterator[np.ndarray | None]:
    up, down = _flat(one.values["up"]), _flat(one.values["down"])
    scale = one.scale(len(down))
    if "up_bias" in one.values:
        yield one.vector(one.values["up_bias"], "bias", scale)
    yield one.product(up, _core(one.values["mid"], down) if "mid" in one.values else down, scale)
    yield from one.bias()


def _loha(one: _Module) -> Iterator[np.ndarray | None]:
    a, b, c, d = (one.values[f"hada_{name}"] for name in ("w1_a", "w1_b", "w2_a", "w2_b"))
    rank = len(b)
    if "hada_t1" in one.values and "hada_t2" in one.values:
        a, b, c, d = a.T, _core(one.values["hada_t1"], b), c.T, _core(one.values["hada_t2"], d)
    elif {"hada_t1", "hada_t2"} & set(one.values):
        yield None
        return
    b, d = _flat(b), _flat(d)
    if a.ndim != 2 or c.ndim != 2 or len(a) != len(c) or b.shape[1] != d.shape[1] or a.shape[1] != len(b):
        raise one.unfit()
    if c.shape[1] != len(d):
        raise one.unfit()
    if max(len(a), b.shape[1]) > LONGEST_SIDE:
        yield None
    elif len(b) * len(d) * (len(a) + b.shape[1]) < len(a) * b.shape[1]:
        for column in range(len(b)):
            yield one.product(a[:, column : column + 1] * c, b[column : column + 1] * d, one.scale(rank))
    else:
        yield _whole(one, lambda rows: (a[rows] @ b) * (c[rows] @ d), len(a), b.shape[1], one.scale(rank))
    yield from one.bias()


def _whole(one: _Module, rows_of: Callable[[slice], np.ndarray], outputs: int, inputs: int, scale: float) -> np.ndarray:
    """Of a change that is made some rows at a time."""
    p, q = one.signs(outputs, inputs)
    step = max(1, MOST_ELEMENTS // 4 // max(inputs, 1))
    found = np.zeros(p.shape[1])
    for start in range(0, outputs, step):
        rows = slice(start, start + step)
        found += ((rows_of(rows) @ q) * p[rows]).sum(0, dtype=np.float64)
    return found * scale


def _lokr(one: _Module) -> Iterator[np.ndarray | None]:
    sides = _kronecker_sides({name: value.shape for name, value in one.values.items()})
    (first_out, first_in), (second_out, second_in) = sides
    outputs, inputs = first_out * second_out, first_in * second_in
    if max(outputs, inputs) > LONGEST_SIDE or max(math.prod(side) for side in sides) > MOST_ELEMENTS:
        yield None
        return
    first, second, rank = _kronecker_factors(one.values)
    if first.shape != sides[0] or second.shape != sides[1]:
        raise one.unfit()
    if rank is None:  # both factors are whole: LyCORIS does not scale them, PEFT by the rank of its configuration
        told = one.scaling.rank_of(one.group.module)
        scale = 1.0 if told is None else one.scale(max(1, round(told)))
    else:
        scale = one.scale(rank)
    p, q = one.signs(outputs, inputs)
    p, q = p.reshape(first_out, second_out, -1), q.reshape(first_in, second_in, -1)
    found = np.zeros(p.shape[2])
    for column in range(first_in):
        found += (np.tensordot(first[:, column], p, axes=1) * (second @ q[column])).sum(0, dtype=np.float64)
    yield found * scale
    yield from one.bias()


def _kronecker_factors(values: Values) -> tuple[np.ndarray, np.ndarray, int | None]:
    """Both factors as matrices, and the rank of the one that is factored itself."""
    rank = None
    second = values.get("lokr_w2")
    if second is None:
        a, b = values["lokr_w2_a"], values["lokr_w2_b"]
        if "lokr_t2" in values:
            rank, second = len(a), a.T @ _core(values["lokr_t2"], b)
        else:
            rank, second = a.shape[1], a @ _flat(b)
    first = values.get("lokr_w1")
    if first is None:
        rank = values["lokr_w1_a"].shape[1]
        first = values["lokr_w1_a"] @ _flat(values["lokr_w1_b"])
    return _flat(first), _flat(second), rank


def _full(one: _Module) -> Iterator[np.ndarray | None]:
    if "diff" in one.values:
        whole = _flat(one.values["diff"])
        if max(whole.shape) > LONGEST_SIDE:
            yield None
            return
        yield _whole(one, lambda rows: whole[rows], len(whole), whole.shape[1], 1.0)
    yield from one.bias()


def _norm(one: _Module) -> Iterator[np.ndarray | None]:
    whole = _flat(one.values["w_norm"].reshape(-1))
    yield None if len(whole) > LONGEST_SIDE else _whole(one, lambda rows: whole[rows], len(whole), 1, 1.0)
    if "b_norm" in one.values:
        yield one.vector(one.values["b_norm"], "bias")
    yield from one.bias()


def _glora(one: _Module) -> Iterator[np.ndarray | None]:
    """W A + B: B as a change, A [inputs, inputs] as a mixing of the inputs."""
    a1, a2, b1, b2 = (_flat(one.values[name]) for name in ("a1", "a2", "b1", "b2"))
    scale = one.scale(len(a2))
    yield one.product(b1, _core(one.values["bm"], b2) if "bm" in one.values else b2, scale)
    if a1.shape[1] != len(a2) or max(len(a1), a2.shape[1]) > LONGEST_SIDE:
        raise one.unfit()
    p, q = of_shared_inputs(one.place, len(a1), "mixing"), of_inputs(a2.shape[1])
    yield np.asarray(((a1.T @ p) * (a2 @ q)).sum(0, dtype=np.float64) * scale)
    yield from one.bias()


def _tlora(one: _Module) -> Iterator[np.ndarray | None]:
    """P diag(s) Q less what it began with; without that it mostly is the weight's own principal part."""
    if not {"base_q", "base_p", "base_lambda"} <= set(one.values):
        yield None
        return
    for q, p, values, sign in (("q_layer", "p_layer", "lambda_layer", 1), ("base_q", "base_p", "base_lambda", -1)):
        down, up = _flat(one.values[q]), _flat(one.values[p])
        yield one.product(up * one.values[values].reshape(-1), down, sign * one.scale(len(down)))
    yield from one.bias()


def _rotated(one: _Module) -> Iterator[np.ndarray | None]:
    """LyCORIS' and sd-scripts' OFT and BOFT: Q = B - B^T in blocks along the outputs, and scales of outputs."""
    numbered = sorted(name for name in one.values if name.startswith("oft_blocks"))
    stages: dict[int, list[np.ndarray]] = {}
    for name in numbered:
        blocks = one.values[name]
        if blocks.ndim not in (3, 4) or blocks.shape[-1] != blocks.shape[-2] or not blocks.size:
            raise one.unfit("its blocks are no rotations")
        for number, stage in enumerate(blocks if blocks.ndim == 4 else blocks[None]):
            stages.setdefault(number, []).append(stage)
    for number, parts in stages.items():
        yield _generators(one, [part - part.transpose(0, 2, 1) for part in parts], f"outputs turned, {number}")
    if "rescale" in one.values:
        yield one.vector(one.values["rescale"] - 1, "outputs scaled")
    yield from one.bias()


def _generators(one: _Module, parts: list[np.ndarray], space: str) -> np.ndarray | None:
    """Of skew-symmetric blocks [n, b, b] along the outputs, one set of them after the other."""
    outputs = sum(len(part) * part.shape[1] for part in parts)
    if outputs > LONGEST_SIDE:
        return None
    p, q = (of_outputs(one.place, outputs, None, f"{space}, {side}", side) for side in ("left", "right"))
    return _blockwise(parts, p, q)


def _blockwise(parts: list[np.ndarray], p: np.ndarray, q: np.ndarray) -> np.ndarray:
    found, start = np.zeros(p.shape[1]), 0
    for part in parts:
        rows = slice(start, start + len(part) * part.shape[1])
        of = q[rows].reshape(len(part), part.shape[1], -1)
        found += (p[rows] * (part @ of).reshape(-1, p.shape[1])).sum(0, dtype=np.float64)
        start = rows.stop
    return found


def _peft_oft(one: _Module) -> Iterator[np.ndarray | None]:
    """PEFT's and OneTrainer's OFT: the numbers above the diagonal of Q, in blocks along the inputs."""
    numbers = one.values["oft_r"]
    if numbers.ndim != 2:
        raise one.unfit("its numbers are no rotations")
    side = round((1 + math.sqrt(1 + 8 * numbers.shape[1])) / 2)
    if side * (side - 1) // 2 != numbers.shape[1] or len(numbers) * side > LONGEST_SIDE:
        yield None
        return
    if "scaled" in one.values and side > 1:
        numbers = numbers / (2 * math.sqrt(side - 1))
    blocks = np.zeros((len(numbers), side, side), np.float32)
    upper = np.triu_indices(side, 1)
    blocks[:, upper[0], upper[1]] = numbers
    yield _turned_inputs(one, blocks - blocks.transpose(0, 2, 1), "inputs turned")
    yield from one.bias()


def _peft_boft(one: _Module) -> Iterator[np.ndarray | None]:
    """PEFT's BOFT: of each stage Q = (B - B^T) / 2 in blocks along the inputs, and scales of outputs."""
    stages = one.values["boft_r"]
    if stages.ndim != 4 or stages.shape[2] != stages.shape[3]:
        raise one.unfit("its blocks are no rotations")
    for number, blocks in enumerate(stages):
        yield _turned_inputs(one, (blocks - blocks.transpose(0, 2, 1)) / 2, f"inputs turned, {number}")
    yield one.vector(one.values["boft_s"] - 1, "outputs scaled")
    yield from one.bias()


def _turned_inputs(one: _Module, blocks: np.ndarray, space: str) -> np.ndarray | None:
    inputs = len(blocks) * blocks.shape[1]
    if inputs > LONGEST_SIDE:
        return None
    return _blockwise([blocks], of_shared_inputs(one.place, inputs, space), of_inputs(inputs))


def _ia3(one: _Module) -> Iterator[np.ndarray | None]:
    """LyCORIS' IA3: scales less one."""
    on_input = bool(one.values["on_input"].flat[0])
    yield _scales(one, one.values["weight"], on_input)
    yield from one.bias()


def _peft_ia3(one: _Module) -> Iterator[np.ndarray | None]:
    scale = one.values["ia3_l"]
    yield _scales(one, scale - 1, scale.ndim >= 2 and scale.shape[0] == 1)
    yield from one.bias()


def _scales(one: _Module, less_one: np.ndarray, on_input: bool) -> np.ndarray | None:
    return one.on_inputs(less_one, "inputs scaled") if on_input else one.vector(less_one, "outputs scaled")


_BY_ALGORITHM: Mapping[Algorithm, Callable[[_Module], Iterator[np.ndarray | None]]] = {
    Algorithm.lora: _lora, Algorithm.loha: _loha, Algorithm.lokr: _lokr, Algorithm.full: _full, Algorithm.norm: _norm,
    Algorithm.glora: _glora, Algorithm.tlora: _tlora, Algorithm.oft: _rotated, Algorithm.boft: _rotated,
    Algorithm.oft_kohya: _rotated, Algorithm.peft_oft: _peft_oft, Algorithm.peft_boft: _peft_boft,
    Algorithm.ia3: _ia3, Algorithm.peft_ia3: _peft_ia3,
}  # fmt: skip
