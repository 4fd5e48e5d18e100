"""A Program as the kernel launches of the cuda backend: what runs after what, and what is fused.

Pure data: buffers and tensors by name, no address and no number of tokens. The builder compiles the kernels
that the launches name, the backend fills in addresses and launches them. Fused are a norm or activation with
the preparation of its linear readers' inputs, linears of one format that read one buffer, a linear with the
add after it, and the rotations of q and k with the store of k and v.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile

from edge_runtime.engine import device_code as code
from edge_runtime.engine.angles import angle_tables
from edge_runtime.engine.device_code import Kernel, MatrixKernels, matrix_kernels
from edge_runtime.engine.launches import (
    LOGITS,
    MATRICES,
    ROWS,
    AnglesLaunch,
    AppendLaunch,
    AttentionLaunch,
    EmbedLaunch,
    Launch,
    LinearLaunch,
    Lowered,
    LowRankLaunch,
    PrepareLaunch,
    Product,
    RotateLaunch,
    RowLaunch,
    SampleLaunches,
    Update,
    kernels_of,
)
from edge_runtime.engine.manifest import PartEntry
from edge_runtime.engine.ops import (
    Activation,
    Add,
    AnyOp,
    Attention,
    Embed,
    Gather,
    Input,
    KvAppend,
    Linear,
    Logits,
    Norm,
    Rope,
    Round,
    reads,
    writes,
)
from edge_runtime.engine.plan import KvPlan
from edge_runtime.engine.program import Program


def lower(program: Program, formats: dict[str, str], kv: KvPlan) -> Lowered:
    """The launches of a program whose tensors have these formats.

    Raises Unsupported for a format, a KV format or an op that the cuda backend has no kernel for.
    """
    plain, adapting = (_Lowering(program, formats, kv, adapters=adapters) for adapters in (False, True))
    plain.run()
    adapting.run()
    return Lowered(
        tuple(plain.launches),
        tuple(adapting.launches),
        SampleLaunches(*code.sample_kernels(), softcap=program.heads[0].softcap or 0.0),
        tuple(code.move_kernel(kv, slot.head_dim) for slot in program.cache),
        tuple(angle_tables(program)),
    )


def device_kernels(parts: Mapping[str, PartEntry]) -> tuple[Kernel, ...]:
    """Every kernel that some part of an engine needs, by name. Raises Unsupported as `lower`."""
    found: dict[str, Kernel] = {}
    for entry in parts.values():
        plan = entry.plan
        lowered = lower(entry.program, {name: t.format for name, t in plan.tensors.items()}, plan.kv)
        found |= {kernel.symbol: kernel for kernel in kernels_of(lowered)}
    return tuple(found[symbol] for symbol in sorted(found))


def launches_of_decoding(program: Program) -> int:
    """Kernel launches of a step of few tokens, with matrices of one format."""
    formats = {name: "f32" if s.role == "vector" else "int4_g64" for name, s in program.tensors.items()}
    cache = KvPlan(k="f16", v="f16", page_tokens=16, pages=1)
    plain = _Lowering(program, formats, cache, adapters=False)
    plain.run()
    merges = sum(isinstance(launch, AttentionLaunch) for launch in plain.launches)
    return len(plain.launches) + merges + 2  # logits finished, tokens picked


class _Lowering:
    """One pass over the ops; `_prepared` says what the inputs hold: the buffer as last written, and kind."""

    def __init__(self, program: Program, formats: dict[str, str], kv: KvPlan, *, adapters: bool) -> None:
        """adapters: with what adds them, and the rows of every product's inputs, which they read."""
        self._program = program
        self._adapters = adapters
        updatable = (i for i, op in enumerate(program.ops) if isinstance(op, Linear | Logits))
        self._numbers = {i: number for number, i in enumerate(updatable)}
        self._formats = formats
        self._kv = kv
        self._tables = list(angle_tables(program))
        self._prepared: tuple[str, str] | None = None
        self.launches: list[Launch] = []

    def run(self) -> None:
        for i, (name, scale) in enumerate(self._tables):
            freqs = self._program.tensors[name].cols
            self.launches.append(AnglesLaunch(code.angles_kernel(), name, scale, freqs, i))
        ops, at = self._program.ops, 0
        while at < len(ops):
            taken = self._lower(ops, at)
            written = {name for op in ops[at : at + taken] for name in writes(op)}
            if self._prepared is not None and self._prepared[0] in written - self._fresh:
                self._prepared = None
            at += taken

    def _lower(self, ops: Sequence[AnyOp], at: int) -> int:
        """Append the launches of the op at `at`, and of those that are fused with it; returns how many."""
        op, width = ops[at], self._program.buffers
        self._fresh: set[str] = set()
        match op:
            case Embed():
                kernel = self._matrix(op.weight).embed
                self.launches.append(EmbedLaunch(kernel, op.weight, op.out, op.scale, op.first))
            case Input():
                self.launches.append(
                    RowLaunch(code.input_kernel(), "values", width[op.out], width[op.out], op.out)
                )
            case Norm():
                if op.group in (0, width[op.x]):
                    return self._norm(ops, at, op)
                self._rows_norm(op)
            case Linear():
                return self._linears(ops, at, op)
            case Rope() | KvAppend():
                return self._append(ops, at)
            case Attention():
                kernels = code.attention_kernels(op, self._kv)
                self.launches.append(AttentionLaunch(*kernels, op))
            case Activation():
                return self._activation(ops, at, op)
            case Add():
                self.launches.append(
                    RowLaunch(
                        code.add_kernel(),
                        "values",
                        width[op.out],
                        width[op.out],
                        op.out,
                        x=op.a,
                        y=op.b,
                        scale=op.scale,
                    )
                )
            case Gather():
                self.launches.append(
                    RowLaunch(
                        code.gather_kernel(),
                        "tokens",
                        width[op.x],
                        width[op.out],
                        op.out,
                        op.x,
                        weight=op.order,
                    )
                )
            case Round():
                threads = code.run_threads(width[op.x])
                kernel = code.round_kernel(op.format, width[op.x])
                self.launches.append(
                    RowLaunch(
                        kernel,
                        "runs",
                        width[op.x],
                        width[op.x],
                        op.out,
                        op.x,
                        group=width[op.x],
                        threads=threads,
                        scale=op.scale or 0.0,
                    )
                )
            case Logits():
                return self._logits(ops, at, "plain", op.x)
        return 1

    def _matrix(self, name: str) -> MatrixKernels:
        return matrix_kernels(self._formats[name])

    def _prepare(self, source: str, kind: str, x: str, out: str | None = None, **more: object) -> None:
        width = self._program.buffers[x]
        shared = code.shares_rows(source, kind)
        kernel = code.prepare_kernel(source, kind, width)
        self.launches.append(PrepareLaunch(kernel, kind, shared, width, x, out=out, **more))  # type: ignore[arg-type]

    def _norm(self, ops: Sequence[AnyOp], at: int, op: Norm) -> int:
        """A norm of whole rows: with the inputs of what reads it right after."""
        following = ops[at + 1]
        source = {"y": None, "weight": op.weight, "bias": op.bias, "eps": op.eps}
        kind = "rms" if op.kind == "rms" else "layer"
        if isinstance(following, Logits) and following.x == op.out:
            return 1 + self._logits(ops, at + 1, kind, op.x, **source)
        if isinstance(following, Linear) and following.x == op.out:
            inputs = self._matrix(following.weight).kind
            self._prepare(kind, inputs, op.x, self._others(ops, at, op.out, inputs), **source)
            self._prepared, self._fresh = (op.out, inputs), {op.out}
            return 1
        self._rows_norm(op)
        return 1

    def _activation(self, ops: Sequence[AnyOp], at: int, op: Activation) -> int:
        following, width = ops[at + 1], self._program.buffers[op.x]
        kind = f"gated_{op.kind}" if op.up is not None else op.kind
        if isinstance(following, Linear) and following.x == op.out:
            inputs = self._matrix(following.weight).kind
            self._prepare(kind, inputs, op.x, self._others(ops, at, op.out, inputs), y=op.up)
            self._prepared, self._fresh = (op.out, inputs), {op.out}
            return 1
        self.launches.append(
            RowLaunch(code.activation_kernel(kind), "values", width, width, op.out, op.x, y=op.up)
        )
        return 1

    def _rows_norm(self, op: Norm) -> None:
        width = self._program.buffers[op.x]
        group = op.group or width
        self.launches.append(
            RowLaunch(
                code.norm_kernel(op.kind, group),
                "runs",
                width,
                width,
                op.out,
                op.x,
                weight=op.weight,
                bias=op.bias,
                group=group,
                threads=code.run_threads(group),
                eps=op.eps,
            )
        )

    def _others(self, ops: Sequence[AnyOp], at: int, name: str, kind: str) -> str | None:
        """The buffer written at `at` if more than the run of linears with these inputs reads it."""
        if self._adapters:
            return name
        run = True
        for op in ops[at + 1 :]:
            mine = isinstance(op, Linear) and op.x == name and self._matrix(op.weight).kind == kind
            run = run and (mine or isinstance(op, Add))  # which may be fused with the linear before it
            if name in reads(op) and not (run and mine):
                return name
            if name in writes(op):
                return None
        return None

    def _linears(self, ops: Sequence[AnyOp], at: int, first: Linear) -> int:
        """Linears of one format on one buffer, or one with the add after it."""
        kernels = self._matrix(first.weight)
        if self._prepared != (first.x, kernels.kind):
            self._prepare("plain", kernels.kind, first.x)
            self._prepared = (first.x, kernels.kind)
        products: list[Product] = []
        taken = 0
        while len(products) < MATRICES and at + taken < len(ops):
            op = ops[at + taken]
            same = isinstance(op, Linear) and op.x == first.x
            if (
                not isinstance(op, Linear)
                or not same
                or self._formats[op.weight] != self._formats[first.weight]
            ):
                break
            fused = self._fused_add(ops, at + taken, op)
            if fused is not None and products:
                break  # a launch of its own, as its outputs lie elsewhere
            products.append(fused or Product(op.weight, op.bias, op.out))
            taken += 1
            if fused is not None:
                taken += 1
                break
            if not self._read_later(ops, at + taken, op.out):
                break  # nothing reads it, so its bytes may be those of the next one's outputs (layout.py)
        cols = self._program.tensors[first.weight].cols
        self._multiply(LinearLaunch(kernels, tuple(products), cols), first.x, at)
        return taken

    def _multiply(self, launch: LinearLaunch, x: str, at: int) -> None:
        """Append the launch of products of the ops at `at` and after it. Inputs x are read before outputs
        are written, which may lie on their bytes."""
        updates = tuple(
            Update(self._numbers[at + i], p.weight, p.out, p.scale * p.add_scale, p.first)
            for i, p in enumerate(launch.products)
        )
        into, out = code.low_rank_kernels()
        if self._adapters:
            self.launches.append(LowRankLaunch(into, "in", updates, x, launch.cols, launch.rows))
        self.launches.append(launch)
        if self._adapters:
            self.launches.append(LowRankLaunch(out, "out", updates, x, launch.cols, launch.rows))

    def _fused_add(self, ops: Sequence[AnyOp], at: int, op: Linear) -> Product | None:
        """The linear with the add that follows it, where nothing else reads what lies between."""
        add = ops[at + 1]
        if not isinstance(add, Add) or (add.a == op.out) == (add.b == op.out):
            return None
        other = add.a if add.b == op.out else add.b
        if add.a == op.out and add.scale != 1.0:
            return None
        if add.out != op.out and self._read_later(ops, at + 2, op.out):
            return None
        return Product(op.weight, op.bias, add.out, add=other, add_scale=add.scale)

    @staticmethod
    def _read_later(ops: Sequence[AnyOp], at: int, name: str) -> bool:
        for op in ops[at:]:
            if name in reads(op):
                return True
            if name in writes(op):
                return False
        return False

    def _append(self, ops: Sequence[AnyOp], at: int) -> int:
        """Rotations and the store after them in one launch, where they are of one table."""
        run = [
            op for op in takewhile(lambda op: isinstance(op, Rope), ops[at : at + 2]) if isinstance(op, Rope)
        ]
        last = ops[at + len(run)]
        if isinstance(last, KvAppend) and self._together(run, last):
            keys = [op for op in run if op.x == last.k]
            queries = [op for op in run if op.x != last.k]
            slot = self._program.cache[last.layer]
            rope = run[0] if run else None
            self.launches.append(
                AppendLaunch(
                    code.append_kernel(self._kv, slot.head_dim),
                    last.layer,
                    queries[0].x if queries else None,
                    last.k,
                    last.v,
                    self._table(rope) if rope is not None and keys else None,
                    self._program.buffers[queries[0].x] // slot.head_dim if queries else 0,
                    slot.kv_heads,
                    self._program.tensors[rope.inv_freq].cols if rope is not None else 0,
                )
            )
            return len(run) + 1
        op = run[0]
        self.launches.append(
            RotateLaunch(
                code.rotate_kernel(op.head_dim),
                op.x,
                self._table(op),
                self._program.buffers[op.x] // op.head_dim,
                self._program.tensors[op.inv_freq].cols,
            )
        )
        return 1

    def _together(self, run: Sequence[Rope], store: KvAppend) -> bool:
        """Whether rotations can run with a store: of its key and one query by one table, or none."""
        head_dim = self._program.cache[store.layer].head_dim
        if not run:
            return True
        names = [op.x for op in run]
        one = len({(op.inv_freq, op.scale, op.head_dim) for op in run}) == 1 and run[0].head_dim == head_dim
        return one and store.k in names and store.v not in names and len(set(names)) == len(names)

    def _table(self, op: Rope) -> int:
        return self._tables.index((op.inv_freq, op.scale))

    def _logits(self, ops: Sequence[AnyOp], at: int, source: str, x: str, **more: object) -> int:
        """The blocks of the logits: inputs of one kind made once, those of one format in one launch."""
        heads = [op for op in ops[at:] if isinstance(op, Logits)]
        kind: str | None = None
        done = 0
        while done < len(heads):
            kernels = self._matrix(heads[done].weight)
            if kernels.kind != kind:
                kind = kernels.kind
                self._prepare(source, kind, x, ROWS, rows="logits", **more)
            fmt = self._formats[heads[done].weight]
            products: list[Product] = []
            for op in heads[done : done + MATRICES]:
                if self._formats[op.weight] != fmt:
                    break
                products.append(Product(op.weight, op.bias, LOGITS, scale=op.scale, first=op.first))
            cols = self._program.tensors[heads[done].weight].cols
            self._multiply(LinearLaunch(kernels, tuple(products), cols, "logits"), ROWS, at + done)
            done += len(products)
        return done
