"""Launches of a lowered Program for steps of a size: grids and argument records with addresses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from ctypes import Structure

from edge_runtime.backends.cuda import records as rec
from edge_runtime.backends.cuda.driver import Driver, Function, Launch, Module
from edge_runtime.backends.cuda.placement import Placement
from edge_runtime.backends.cuda.tuning import Form, default_form, product_key
from edge_runtime.backends.protocol import Part
from edge_runtime.engine import device_code as code
from edge_runtime.engine.device_code import Kernel
from edge_runtime.engine.device_memory import SPLIT_TOKENS, step_layout
from edge_runtime.engine.launches import (
    LOGITS,
    AnglesLaunch,
    AppendLaunch,
    AttentionLaunch,
    EmbedLaunch,
    LinearLaunch,
    Lowered,
    LowRankLaunch,
    PrepareLaunch,
    RotateLaunch,
    RowLaunch,
    Rows,
    kernels_of,
)
from edge_runtime.engine.mma_order import PANEL

Grid = tuple[int, int, int]
ROW_VALUES = 1024  # values of a block of a row kernel
Step = tuple[Kernel, Grid, Structure]


class Launcher:
    """Makes the launches of steps with up to so many tokens; the same arguments serve every such step."""

    def __init__(
        self,
        driver: Driver,
        module: Module,
        lowered: Lowered,
        part: Part,
        place: Placement,
        step: rec.Step,
        forms: Mapping[str, Form] | None = None,
    ) -> None:
        """forms: of products by `key_of`, where some were measured to be the fastest."""
        self._driver = driver
        self._lowered = lowered
        self._part = part
        self._place = place
        self._step = step
        self._forms: Mapping[str, Form] = {} if forms is None else forms
        self.overlap = True  # whether a launch may begin before the one in front of it has ended
        self._functions: dict[str, Function] = {
            kernel.symbol: driver.function(module, kernel.symbol) for kernel in kernels_of(lowered)
        }

    def step(self, tokens: int, *, adapting: bool = False) -> list[Launch]:
        """A forward pass: from ids to finished logits and the likeliest token of each row; adapting: of
        sequences some of which use adapters."""
        logits = min(self._part.step.logits, tokens)
        launches = self._lowered.adapting if adapting else self._lowered.launches
        steps = [s for launch in launches for s in self._of(launch, tokens, logits)]
        sample, record = self._lowered.sample, self._sample(0)
        slices = code.sample_slices(self._part.program.vocab_size)
        steps.append((sample.finish, (slices, logits, 1), record))
        steps.append((sample.merge, (logits, 1, 1), record))
        return [self._prepare(*s, overlap=self.overlap and i > 0) for i, s in enumerate(steps)]

    def function(self, kernel: Kernel) -> Function:
        return self._functions[kernel.symbol]

    def advance(self) -> Launch:
        """What makes the chosen tokens those of a chain's next step."""
        return self._prepare(self._lowered.sample.advance, (1, 1, 1), self._sample(0))

    def likeliest(self, k: int) -> list[Launch]:
        """The `k` likeliest tokens of each row of the step that ran last, into the region `top`."""
        record = self._sample(k)
        record.softcap = 0.0  # the logits have gone through it
        grid = (code.sample_slices(self._part.program.vocab_size), self._part.step.logits, 1)
        sample = self._lowered.sample
        return [
            self._prepare(sample.finish, grid, record),
            self._prepare(sample.merge, (self._part.step.logits, 1, 1), record),
        ]

    def use(self, forms: Mapping[str, Form]) -> None:
        """Of products by `key_of`, in steps that are made from now on."""
        self._forms = forms

    def product(self, launch: LinearLaunch, rows: int, form: Form) -> Launch:
        """One product by itself, in a form of its own."""
        return self._prepare(*self._linear(launch, rows, form))

    def rows_of(self, launch: LinearLaunch, tokens: int) -> int:
        """Rows of inputs of a product in steps of so many tokens."""
        return tokens if launch.rows == "tokens" else min(self._part.step.logits, tokens)

    def key_of(self, launch: LinearLaunch, rows: int) -> str:
        formats = {p.weight: self._part.weights[p.weight].format for p in launch.products}
        sizes = {p.weight: self._part.weights[p.weight].rows for p in launch.products}
        return product_key(launch, formats, sizes, rows)

    def _prepare(self, kernel: Kernel, grid: Grid, record: Structure, *, overlap: bool = False) -> Launch:
        function = self._functions[kernel.symbol]
        return self._driver.prepare(function, grid, kernel.threads, 0, bytes(record), overlap)

    def _of(self, launch: object, tokens: int, logits: int) -> Iterator[Step]:
        match launch:
            case EmbedLaunch():
                yield launch.kernel, (tokens, 1, 1), self._embed(launch)
            case PrepareLaunch():
                rows = tokens if launch.rows == "tokens" else logits
                share = -(-code.padded_columns(launch.width) // ROW_VALUES) if launch.shared else 1
                yield launch.kernel, (rows, share, 1), self._inputs_of(launch)
            case LinearLaunch():
                rows = self.rows_of(launch, tokens)
                form = self._forms.get(self.key_of(launch, rows), default_form(rows))
                yield self._linear(launch, rows, form)
            case LowRankLaunch():
                yield self._low_rank(launch, tokens if launch.rows == "tokens" else logits)
            case RowLaunch():
                yield launch.kernel, (self._row_blocks(launch, tokens), 1, 1), self._row(launch)
            case AnglesLaunch():
                record = rec.Angles(
                    step=self._step,
                    inv_freq=self._place.vector(launch.inv_freq),
                    angles=self._angles(launch.table),
                    freqs=launch.freqs,
                    scale=launch.scale,
                )
                yield launch.kernel, code.angles_grid(tokens, launch.freqs), record
            case AppendLaunch():
                yield launch.kernel, self._append_grid(launch, tokens), self._append(launch)
            case RotateLaunch():
                yield launch.kernel, code.heads_grid(tokens, launch.heads), self._rotate(launch)
            case AttentionLaunch():
                yield from self._attention(launch, tokens)

    def _embed(self, launch: EmbedLaunch) -> rec.Embed:
        kernels = code.matrix_kernels(self._part.weights[launch.weight].format)
        cols = self._part.program.tensors[launch.weight].cols
        return rec.Embed(
            step=self._step,
            matrix=self._place.matrix(launch.weight),
            out=self._place.buffer(launch.out),
            cols=cols,
            units=-(-cols // kernels.unit),
            scale=launch.scale,
            first=launch.first,
        )

    def _inputs(self, kind: str, width: int) -> rec.Inputs:
        columns = code.padded_columns(width)
        groups = columns // int(kind[3:]) if kind.startswith("int") else 1
        return rec.Inputs(
            codes=self._place.region("codes"),
            scales=self._place.region("scales"),
            sums=self._place.region("sums") if kind.startswith("int") else None,
            chunks=columns // (64 if kind.startswith("int") else 32),
            groups=groups,
        )

    def _optional(self, name: str | None) -> int | None:
        return None if name is None else self._place.buffer(name)

    def _inputs_of(self, launch: PrepareLaunch) -> rec.Prepare:
        return rec.Prepare(
            step=self._step,
            inputs=self._inputs(launch.kind, launch.width),
            x=self._place.buffer(launch.x),
            y=self._optional(launch.y),
            weight=self._place.vector(launch.weight),
            bias=self._place.vector(launch.bias),
            out=self._optional(launch.out),
            width=launch.width,
            eps=launch.eps,
            rows=int(launch.rows == "logits"),
        )

    def _linear(self, launch: LinearLaunch, rows: int, form: Form) -> Step:
        """For so many rows of inputs."""
        kernels = launch.kernels
        tile = kernels.tile_panels if form == "tile" else 1
        record = rec.Linear(
            step=self._step,
            inputs=self._inputs(kernels.kind, launch.cols),
            count=len(launch.products),
            units=-(-launch.cols // kernels.unit),
            row_count=rec.TOKENS if launch.rows == "tokens" else rec.LOGITS,
        )
        panels = 0
        for i, product in enumerate(launch.products):
            matrix = self._place.matrix(product.weight)
            matrix.bias = self._place.vector(product.bias)
            matrix.out = self._place.buffer(product.out) + 4 * product.first
            matrix.stride = self._stride(launch.rows, matrix.rows)
            matrix.add = self._optional(product.add)
            matrix.add_scale, matrix.scale_all = product.add_scale, product.scale
            matrix.first_panel = panels
            panels += -(-matrix.rows // (PANEL * tile)) * tile
            record.matrix[i] = matrix
        if form != "tile":
            blocks = 1 if form == "deep" else int(form.removeprefix("split"))
            kernel = kernels.deep if form == "deep" else kernels.split[blocks]
            return kernel, (panels, -(-rows // (blocks * code.TOKEN_BLOCK)), 1), record
        return kernels.tile, (panels // tile, -(-rows // code.TILE_TOKENS), 1), record

    def _stride(self, rows: Rows, outputs: int) -> int:
        """Values from one row of a product's results to the next."""
        return self._part.program.vocab_size if rows == "logits" else outputs

    def _low_rank(self, launch: LowRankLaunch, rows: int) -> Step:
        """For so many rows of x."""
        at = step_layout(self._part.program, self._part.kv, self._part.step)[0]["adapters"]
        record = rec.LowRank(
            step=self._step,
            adapters=self._place.region("step") + 4 * at,
            x=self._place.buffer(launch.x),
            count=len(launch.updates),
            cols=launch.cols,
            row_count=rec.TOKENS if launch.rows == "tokens" else rec.LOGITS,
        )
        panels = 0
        for i, update in enumerate(launch.updates):
            size = self._part.program.tensors[update.weight].rows
            record.matrix[i] = rec.Updated(
                out=self._place.buffer(update.out) + 4 * update.first,
                scale=update.scale,
                op=update.op,
                rows=size,
                first_panel=panels,
                stride=self._stride(launch.rows, size),
            )
            panels += -(-size // code.RANK_PANEL)
        record.panels = panels
        into, out = code.low_rank_grids(len(launch.updates), panels, rows)
        return launch.kernel, into if launch.side == "in" else out, record

    def _row_blocks(self, launch: RowLaunch, tokens: int) -> int:
        match launch.per:
            case "tokens":
                return tokens
            case "values":
                return -(-tokens * launch.out_width // ROW_VALUES)
            case "runs":
                runs = tokens * (launch.x_width // launch.group)
                return -(-runs // (code.ROW_THREADS // launch.threads))

    def _row(self, launch: RowLaunch) -> rec.Row:
        return rec.Row(
            step=self._step,
            x=self._place.region("inputs") if launch.x is None else self._place.buffer(launch.x),
            y=self._optional(launch.y),
            out=self._place.buffer(launch.out),
            weight=self._place.vector(launch.weight),
            bias=self._place.vector(launch.bias),
            x_width=launch.x_width,
            out_width=launch.out_width,
            group=launch.group,
            eps=launch.eps,
            scale=launch.scale,
        )

    def _angles(self, table: int | None) -> int | None:
        """Address of a table of angles."""
        if table is None:
            return None
        before = sum(self._part.program.tensors[name].cols for name, _ in self._lowered.tables[:table])
        return self._place.region("angles") + 4 * self._part.step.tokens * 2 * before

    def _append(self, launch: AppendLaunch) -> rec.Append:
        return rec.Append(
            step=self._step,
            k=self._place.kv(launch.layer, "k"),
            v=self._place.kv(launch.layer, "v"),
            q=self._optional(launch.q),
            key=self._place.buffer(launch.key),
            value=self._place.buffer(launch.value),
            angles=self._angles(launch.table),
            heads=launch.heads,
            kv_heads=launch.kv_heads,
            freqs=launch.freqs,
            page_tokens=self._part.kv.page_tokens,
        )

    @staticmethod
    def _append_grid(launch: AppendLaunch, tokens: int) -> Grid:
        heads = launch.heads if launch.q is not None else 0
        return code.heads_grid(tokens, heads + 2 * launch.kv_heads)

    def _rotate(self, launch: RotateLaunch) -> rec.Append:
        return rec.Append(
            step=self._step,
            q=self._place.buffer(launch.x),
            angles=self._angles(launch.table),
            heads=launch.heads,
            freqs=launch.freqs,
        )

    def _attention(self, launch: AttentionLaunch, tokens: int) -> Iterator[Step]:
        op, kv = launch.op, self._part.kv
        split = tokens <= SPLIT_TOKENS
        longest = min(self._part.step.context, self._part.program.max_context)
        record = rec.Attend(
            step=self._step,
            k=self._place.kv(op.layer, "k"),
            v=self._place.kv(op.layer, "v"),
            q=self._place.buffer(op.q),
            out=self._place.buffer(op.out),
            partial=self._place.region("partial") if split else None,
            heads=op.heads,
            kv_heads=op.kv_heads,
            page_tokens=kv.page_tokens,
            chunks=code.attention_chunks(longest),
            window=op.window or 0,
            scale=op.scale,
            softcap=op.softcap or 0.0,
        )
        if split:
            yield launch.split, code.attention_grid(op, tokens, longest), record
            yield launch.merge, code.merge_grid(op, tokens), record
        else:
            yield launch.looped, code.attention_grid(op, tokens, None), record

    def _sample(self, k: int) -> rec.Sample:
        step = self._part.step
        top = self._place.region("top")
        return rec.Sample(
            step=self._step,
            logits=self._place.buffer(LOGITS),
            tokens=self._place.region("answer") + 4,
            top=top,
            top_ids=top + 4 * step.logits * code.TOP,
            keys=self._place.region("keys"),
            history=self._place.region("history"),
            vocab=self._part.program.vocab_size,
            k=k,
            slices=code.sample_slices(self._part.program.vocab_size),
            softcap=self._lowered.sample.softcap,
        )
