"""The parameters of each kind of node, one row each: name, default, meaning, range. Knows no ROS.

A structural parameter decides what `configure` opens; it can be changed while the node is unconfigured only.
The others may change at any time: a goal takes the values of the moment it arrives.
"""

from __future__ import annotations

from dataclasses import dataclass

Value = bool | int | float | str | list[str]
QOS_WORDS = ("DEFAULT", "SENSOR_DATA", "SYSTEM_DEFAULT")  # as in Isaac ROS


@dataclass(frozen=True, slots=True)
class Row:
    """One parameter. low, high: the range of a number. words: what a string may be. fixed: set at
    start only."""

    name: str
    default: Value
    text: str
    low: float | None = None
    high: float | None = None
    words: tuple[str, ...] = ()
    structural: bool = False
    fixed: bool = False

    def trouble(self, value: object) -> str | None:
        """Why a value of the right type is not taken."""
        if self.words and value not in self.words:
            return f"{self.name} is {value!r:.60}, expected one of: {', '.join(map(repr, self.words))}"
        limited = self.low is not None and self.high is not None and isinstance(value, int | float)
        if limited and not self.low <= value <= self.high:  # also NaN
            return f"{self.name} is {value}, expected {self.low:g} to {self.high:g}"
        return None


_QOS = "quality of service: DEFAULT, SENSOR_DATA or SYSTEM_DEFAULT"
MOST_PARALLEL = 1024  # goals that run at once, in any engine
MOST_WAITING = 4096  # goals beyond those
ROWS = (
    Row("engine.path", "", "the .edge file to serve", structural=True),
    Row("engine.backend", "auto", "auto, cpu, reference or what else this machine has", structural=True),
    Row(
        "engine.threads",
        0,
        "threads of a step; 0: every core but one, which is left to the robot",
        0,
        256,
        structural=True,
    ),
    Row(
        "engine.memory_limit_mib",
        0,
        "MiB that the engine may take; 0: what the machine has free",
        0,
        1 << 24,
        structural=True,
    ),
    Row(
        "context.n_ctx", 0, "tokens of prompt and answer together; 0: as planned", 0, 1 << 24, structural=True
    ),
    Row("context.n_parallel", 0, "goals that run at once; 0: as planned", 0, MOST_PARALLEL, structural=True),
    Row("context.n_predict", 256, "most tokens of an answer whose goal names no number", 1, 1 << 20),
    Row("cache.type_k", "", "KV format of keys, such as int8; empty: as planned", structural=True),
    Row("cache.type_v", "", "KV format of values; empty: as planned", structural=True),
    Row(
        "speculative.type",
        "auto",
        "how tokens are guessed ahead",
        words=("auto", "none", "draft", "lookup", "medusa"),  # not "off", which YAML reads as false
        structural=True,
    ),
    Row("speculative.draft.n_max", 0, "most tokens guessed at once; 0: as planned", 0, 64, structural=True),
    Row("speculative.enabled", True, "guess ahead for goals that arrive from now on"),
    Row("lora.adapters", [""], "adapters to load, each NAME=PEFT-FOLDER", structural=True),
    Row("prefix.path", "", "a saved prefix to load; empty: the one beside the engine", structural=True),
    Row("prefix.folder", "", "where save_prefix writes; empty: ~/.cache/edge_runtime/prefixes"),
    Row("worker.enabled", True, "run the engine in a process of its own that is watched", structural=True),
    Row(
        "worker.nice", 10, "niceness of that process, so that control loops go first", 0, 19, structural=True
    ),
    Row(
        "worker.heartbeat_timeout",
        1.5,
        "seconds of silence after which it is replaced",
        0.5,
        60.0,
        structural=True,
    ),
    Row(
        "worker.step_limit", 2.0, "seconds a step may take until it is replaced", 0.1, 600.0, structural=True
    ),
    Row("worker.max_restarts", 5, "restarts in a row until the node gives up", 0, 1000, structural=True),
    Row("queue.depth", 64, "goals that may wait beyond those that run", 1, MOST_WAITING, structural=True),
    Row("deadline.default", 0.0, "seconds for goals that name no deadline; 0: none", 0.0, 86400.0),
    Row(
        "feedback.period", 0.02, "least seconds between two feedbacks of a goal; 0: one each step", 0.0, 10.0
    ),
    Row("sampling.temp", 0.0, "temperature of goals that name none; 0 is greedy", 0.0, 100.0),
    Row("sampling.top_k", 0, "0 keeps all", 0, 2**31 - 1),
    Row("sampling.top_p", 1.0, "above 0, up to 1", 0.001, 1.0),
    Row("sampling.min_p", 0.0, "0 to 1", 0.0, 1.0),
    Row("sampling.penalty_repeat", 1.0, "1 is off", 0.01, 100.0),
    Row("input_qos", "DEFAULT", f"of the text topic that is read; {_QOS}", words=QOS_WORDS, structural=True),
    Row("input_qos_depth", 10, "its history; 0: the profile's own", 0, 4096, structural=True),
    Row("output_qos", "DEFAULT", f"of the topics that are written; {_QOS}", words=QOS_WORDS, structural=True),
    Row("output_qos_depth", 10, "their history; 0: the profile's own", 0, 4096, structural=True),
    Row(
        "input.depth", 4, "texts that may wait; the oldest is dropped for a new one", 1, 4096, structural=True
    ),
    Row(
        "input.max_age", 0.0, "seconds after which a text or its answer is of no use; 0: never", 0.0, 86400.0
    ),
    Row(
        "result.timeout",
        900,
        "seconds that the result of a goal is kept, counted from its acceptance; a goal that would take "
        "longer ends by its deadline before that",
        10,
        86400,
        fixed=True,
    ),
    Row("diagnostics.period", 1.0, "seconds between two reports on /diagnostics", 0.05, 60.0, fixed=True),
)
PLANNER_ROWS = (
    *ROWS,
    Row(
        "plan.schema",
        "",
        "file with the JSON schema of plans; empty: the shipped planner's, or with an engine.path any skills",
        structural=True,
    ),
)
TABLES = {"language": ROWS, "planner": PLANNER_ROWS}  # by kind of node
