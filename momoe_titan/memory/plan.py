"""Predicted memory of a job's training step at any save_percent, and the largest save_percent that fits."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import NamedTuple, overload

from momoe_titan.memory.allocator import MIB, OutOfMemory, block_bytes, peak_with_graph, replay

GIB = 1 << 30
# cuBLAS on a Hopper GPU keeps 32 MiB for each of its handles: forward, backward and optimizer
# threads. Measured as what is missing without it: 0.09 GiB, whatever the batch.
CUBLAS_BYTES = 3 * 32 * MIB
PLAN_FAILED = "momoe_titan.plan: error: "  # the command line says so last, and behind it why


def budget_bytes(memory_budget: float, gpu_bytes: int) -> int:
    """momoe.memory_budget in bytes: up to 1 a fraction of the GPU's memory, above that GiB."""
    return int(memory_budget * gpu_bytes if memory_budget <= 1 else memory_budget * GIB)


def context_bytes(world_size: int) -> int:
    """Memory outside of PyTorch's allocator: the CUDA context with the kernels loaded, and NCCL's
    buffers. Assumed, not measured."""
    return int((0.6 + (1.0 if world_size > 1 else 0.0)) * GIB)


class ZRows(NamedTuple):
    """Which rows of an MoE layer's z a block holds: those that save_percent saves, or the others, computed in the
    backward.

    Attributes:
        tile_bytes: what a block of the others has beyond them where some rows are saved: the tile of both kinds.
    """

    layer: str
    saved: bool
    tile_bytes: int = 0


@dataclass
class Moment:
    """The highest memory in one phase while the same z are alive.

    Attributes:
        phase: "forward", "loss", "backward", "clip" or "optimizer".
        z: (MoE layer, bytes of its z alive at save_percent 100).
        base: bytes of all else.
        parts: the same, by part.
        growth: bytes that `base` grows by where the layer at work receives twice its tokens and slots; see
            `with_growth`.
    """

    phase: str
    z: list[tuple[str, int]]
    base: int
    parts: dict[str, int]
    growth: float = 0

    def total(self, percents: dict[str, float]) -> int:
        return self.base + sum(z_bytes(n, percents[layer]) for layer, n in self.z)


def z_bytes(whole: int, save_percent: float) -> int:
    """What is allocated of z, of which `whole` bytes are saved at save_percent 100."""
    return block_bytes(int(whole * save_percent / 100))


@dataclass
class MemoryPlan:
    """What one rank's GPU holds over a training step, known for every save_percent.

    Attributes:
        layers: names of the MoE layers that have a save_percent, first layer first.
        moments: of the step, see `Moment`.
        kept: bytes alive at the end of the forward, by part, z aside.
        layer_kept: the same by MoE layer.
        layer_growth: bytes that each layer saves beyond that, z aside, where it receives twice its tokens, and where it
            receives twice its slots; see `with_growth`.
        num_parameters: of the whole model.
        staging: bytes of the buffers between GPUs, which are not PyTorch's; part of no other number.
        slack: bytes that the allocator reserves beyond `active`, the larger of save_percent 0 and 100.
        notes: what the numbers leave out.
        events: allocations in order, (block, bytes or 0 to free, which rows of z it holds or None): for
            `reserved`. Not part of `to_dict`.
        step: numbers (first, beyond the last) of the events of the last step's forward and backward.
        from_graph: whether a CUDA graph of these is captured. `reserved` and `slack` then count its memory.
    """

    layers: list[str]
    moments: list[Moment]
    kept: dict[str, int]
    num_parameters: int
    staging: int = 0
    slack: int = 0
    layer_kept: dict[str, int] = field(default_factory=dict)
    layer_growth: dict[str, tuple[float, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    events: list[tuple[int, int, ZRows | None]] = field(default_factory=list)
    step: tuple[int, int] = (0, 0)
    from_graph: bool = False

    def __post_init__(self):
        if self.events:
            # None only where a capacity is given
            self.slack = max(self.reserved(p) - self.active(p) for p in (0, 100))  # pyright: ignore[reportOptionalOperand] - not None

    def percents(self, save_percent: float | Sequence[float]) -> dict[str, float]:
        """By layer, from one number for all or one each."""
        values = save_percent if isinstance(save_percent, Sequence) else [save_percent]
        if len(values) == 1:
            values = list(values) * len(self.layers)
        if len(values) != len(self.layers):
            raise ValueError(
                f"save_percent has {len(values)} numbers, must have 1 or one per MoE layer, {len(self.layers)}"
            )
        return dict(zip(self.layers, values, strict=True))

    def peak_moment(self, save_percent: float | Sequence[float]) -> Moment:
        """When the most is alive."""
        percents = self.percents(save_percent)
        return max(self.moments, key=lambda m: m.total(percents))

    def peak(self, save_percent: float | Sequence[float], phase: str) -> int:
        """Most bytes alive in a phase; 0 if nothing is allocated in it."""
        percents = self.percents(save_percent)
        return max((m.total(percents) for m in self.moments if m.phase == phase), default=0)

    def active(self, save_percent: float | Sequence[float]) -> int:
        """Peak of the bytes handed out: TorchTitan's max_active."""
        return self.peak_moment(save_percent).total(self.percents(save_percent)) + CUBLAS_BYTES

    def saved_z(self, save_percent: float | Sequence[float]) -> int:
        """Bytes of z at the end of the forward."""
        percents = self.percents(save_percent)
        saved = max((m.z for m in self.moments if m.phase == "loss"), key=lambda z: sum(n for _, n in z), default=[])
        return sum(z_bytes(n, percents[layer]) for layer, n in saved)

    @overload
    def reserved(self, save_percent: float | Sequence[float], capacity: None = None) -> int: ...

    @overload
    def reserved(self, save_percent: float | Sequence[float], capacity: int) -> int | None: ...

    def reserved(self, save_percent: float | Sequence[float], capacity: int | None = None) -> int | None:
        """Peak of the bytes that the caching allocator takes from the GPU, TorchTitan's max_reserved;
        None where `capacity` is too little."""
        percents = self.percents(save_percent)

        def scale(num_bytes: int, rows: ZRows | None) -> int:
            if rows is None:
                return num_bytes
            percent = percents[rows.layer] if rows.saved else 100 - percents[rows.layer]
            found = z_bytes(num_bytes, percent)
            return found + block_bytes(rows.tile_bytes) if 0 < percent < 100 and found else found

        scaled = [(block, scale(num_bytes, rows)) for block, num_bytes, rows in self.events]
        if capacity is not None:
            capacity -= CUBLAS_BYTES
        try:
            if self.from_graph:
                return peak_with_graph(scaled, range(*self.step), capacity) + CUBLAS_BYTES
            return replay(scaled, capacity).peak_reserved + CUBLAS_BYTES
        except OutOfMemory:
            return None

    def fill(self, budget: int) -> list[float]:
        """The largest save_percent by layer, in whole percents, with which `active` and `slack` are
        at most `budget` bytes.

        Some layers save all, one a part, the others nothing. This takes the memory of one save_percent for all
        layers, with fewer kernels. The last layers come first, whose z is freed first. All 0 where even that is
        too much.
        """
        choice = [0.0] * len(self.layers)
        for i in reversed(range(len(choice))):
            choice[i] = 100.0
            if self.active(choice) + self.slack <= budget:
                continue
            low, high = 0, 100  # low fits, or is 0
            while high - low > 1:
                choice[i] = float((low + high) // 2)
                low, high = (
                    (int(choice[i]), high) if self.active(choice) + self.slack <= budget else (low, int(choice[i]))
                )
            choice[i] = float(low)
            break
        return choice

    def with_growth(self, more_tokens: "MemoryPlan", more_rows: "MemoryPlan", times: int) -> "MemoryPlan":
        """This plan, of a rank that receives its fair share, with what memory grows by where it receives more.

        What a layer saves grows in proportion to its tokens and its slots. The rest of a moment is the highest of
        several sums that do: a convex function, which lies below the line through this plan and more_rows.

        Args:
            more_tokens: of the same job where the rank receives so many `times` its tokens.
            more_rows: the same with so many `times` its slots as well.
            times: as many as there can be, or more.
        """
        more = times - 1
        kept = (self.layer_kept, more_tokens.layer_kept, more_rows.layer_kept)
        by_layer = {layer: [plan[layer] for plan in kept] for layer in self.layers}
        layer_growth = {layer: ((b - a) / more, (c - b) / more) for layer, (a, b, c) in by_layer.items()}
        bases: dict[tuple, int] = {}
        for m in more_rows.moments:
            key = m.phase, *(layer for layer, _ in m.z)
            bases[key] = max(m.base, bases.get(key, 0))
        moments = []
        for m in self.moments:
            growth = (bases[m.phase, *(layer for layer, _ in m.z)] - m.base) / more
            of_saved = sum(sum(layer_growth[layer]) for layer, _ in m.z)
            moments.append(replace(m, growth=max(growth - of_saved, 0)))
        return replace(self, moments=moments, layer_growth=layer_growth)

    def with_rows(self, more: float) -> "MemoryPlan":
        """The plan where each layer receives that much more than its fair share: 0.05 for 5% more."""
        moments = []
        for m in self.moments:
            growth = m.growth + sum(sum(self.layer_growth[layer]) for layer, _ in m.z)
            z = [(layer, int(n * (1 + more))) for layer, n in m.z]
            moments.append(replace(m, z=z, base=int(m.base + more * growth)))
        return replace(self, moments=moments, events=[])

    def to_dict(self) -> dict:
        values = asdict(self)
        del values["events"]
        return values

    @classmethod
    def from_dict(cls, values: dict) -> "MemoryPlan":
        moments = [Moment(**{**m, "z": [tuple(z) for z in m["z"]]}) for m in values["moments"]]
        return cls(**{**values, "moments": moments})
