"""Predicted seconds of a measured profile, by hand from round numbers."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec
import pytest
from toy_engine import toy_program

from edge_runtime.engine.formats import FORMATS, get_format
from edge_runtime.engine.ops import Attention, Linear
from edge_runtime.engine.packing import cpu_packing, packed_nbytes
from edge_runtime.engine.plan import KvPlan, StepShape, TensorPlan
from edge_runtime.engine.profile import Efficiency, FormatSpeed, load_profile
from edge_runtime.engine.program import Program
from edge_runtime.engine.roofline import (
    Roofline,
    Step,
    family,
    linear_runs,
    odd_heads,
    predict,
    prompt_steps,
    timer,
    unbroken_stages,
    values_per_token,
    weight_names,
    weights_read,
)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "builders"))

from measured import calibrated

KV = KvPlan(k="int8", v="int8", page_tokens=16, pages=8)
PROGRAM = toy_program(layers=2, width=64, vocab=128, context=128)  # heads of 16, hidden 128


def tensors(fmt: str, program: Program = PROGRAM) -> dict[str, TensorPlan]:
    return {
        n: TensorPlan("f32", "rows") if s.role == "vector" else TensorPlan(fmt, cpu_packing(fmt))
        for n, s in program.tensors.items()
    }


def test_a_decode_step_is_the_sum_done_by_hand() -> None:
    """10 GB/s of int8 weights, outputs, values, odd heads, stages, two attentions, a step and its logits."""
    profile = calibrated()
    step = Step(1, 40, True)
    found = timer(PROGRAM, tensors("int8_row"), KV, profile, profile.mode())([step])
    rows = {n: s.rows for n, s in PROGRAM.tensors.items() if s.role in ("matrix", "head")}
    expected = weights_read(PROGRAM, tensors("int8_row")) / 10e9
    expected += get_format("int8_row").nbytes(1, 64) / 10e9  # the embedding's row
    expected += sum(rows.values()) * 0.25e-9 / 2  # outputs, on two threads
    expected += values_per_token(PROGRAM) * 0.5e-9
    expected += 2 * (4 + 2) * 20e-9  # two layers: heads of q and k rotate 8 pairs of values
    query = 4 * (16 * 0.125 + 1.0)  # heads
    row = 2 * (4.0 + 16 * 0.25)  # KV heads
    expected += 2 * 41 * (query + row) * 1e-9  # two layers; it sees itself too
    expected += (50.0 + 1.0) * 1e-6 + unbroken_stages(PROGRAM) * 3e-6 + 128 * 2e-9
    assert found == pytest.approx(expected, rel=1e-12)


def test_a_chunk_is_bound_by_its_operations() -> None:
    profile = calibrated()
    mode = profile.mode()
    roofline = Roofline(PROGRAM, profile, mode)
    chosen = TensorPlan("int8_row", "n16k4")
    name = "layers.0.gate"  # 128 x 64
    outputs, chunk_outputs = 128 * 0.25e-9 / 2, 128 * 0.125e-9 / 2
    one = packed_nbytes("int8_row", "n16k4", 128, 64) / 10e9
    assert roofline.tensor(name, chosen, [Step(1, 0, False)]) == pytest.approx(one + outputs)
    many = 2 * 128 * 64 * 100 / 100e9
    assert many > one
    assert roofline.tensor(name, chosen, [Step(100, 0, False)]) == pytest.approx(many + 100 * chunk_outputs)
    two = roofline.tensor(name, chosen, [Step(100, 0, False), Step(1, 100, True)])
    assert two == pytest.approx(many + one + 100 * chunk_outputs + outputs)


def test_a_row_of_outputs_costs_what_its_format_costs() -> None:
    """At the same rates, 128 rows on two threads; a format without figures costs as much as the slowest."""
    speeds = {
        "nf4_g64": FormatSpeed(gbps=5.0, cached_gbps=5.0, gops=50.0, output_ns=8.0, chunk_output_ns=2.0),
        "nf4_g64_f32": FormatSpeed(gbps=5.0, cached_gbps=5.0, gops=50.0, output_ns=1.0, chunk_output_ns=3.0),
    }
    profile = calibrated(formats=speeds)
    measured = profile.efficiency.measured
    assert measured is not None
    roofline = Roofline(PROGRAM, profile, profile.mode())
    chosen = TensorPlan("nf4_g64", "n16")
    nbytes = packed_nbytes("nf4_g64", "n16", 128, 64)
    one = roofline.tensor("layers.0.gate", chosen, [Step(1, 0, False)])
    assert one == pytest.approx(nbytes / 5e9 + 128 * 8e-9 / 2)
    chunk = roofline.tensor("layers.0.gate", chosen, [Step(100, 0, False)])
    assert chunk == pytest.approx(2 * 128 * 64 * 100 / 50e9 + 100 * 128 * 2e-9 / 2)
    assert [measured.output_ns("f16", tokens) for tokens in (1, 2)] == [8.0, 3.0]


def test_each_token_of_a_chunk_is_a_unit_of_the_stages_before_products() -> None:
    """Half of the 22 stages go token by token; the first token is in the stage's own time."""
    with_units, without = calibrated(), calibrated(unit_us=0.0)
    found = [
        Roofline(PROGRAM, p, p.mode()).rest(KV, [Step(tokens, 0, False)])
        for tokens in (1, 33)
        for p in (with_units, without)
    ]
    assert found[0] == found[1]
    assert found[2] - found[3] == pytest.approx(11 * 32 * 0.25e-6)


def test_a_step_of_a_model_that_leaves_the_host_its_cache_is_cheaper() -> None:
    """Told by the number of weights alone, so that formats do not matter."""
    weights = sum(PROGRAM.tensors[n].size for n in weight_names(PROGRAM))
    step = [Step(1, 0, False)]
    less, enough = (
        Roofline(PROGRAM, p, p.mode()).rest(KV, step)
        for size in (weights - 1, weights)
        for p in [calibrated(core_cache_bytes=size)]
    )
    assert less - enough == pytest.approx(20e-6)


def test_heads_are_odd_where_a_half_or_a_row_is_no_whole_vector() -> None:
    """Heads of 16 rotate 8 pairs and are appended whole; of 8 they are odd in both; of 32 in neither."""
    assert odd_heads(toy_program(layers=1, width=64, vocab=128, context=128)) == 4 + 2
    assert odd_heads(toy_program(layers=1, width=32, vocab=128, context=128)) == 4 + 2 + 2 * 2
    assert odd_heads(toy_program(layers=1, width=128, vocab=128, context=128)) == 0


def test_heads_that_are_not_whole_vectors_are_slower() -> None:
    """Heads of 8 are padded to 16 in products, and their rows are read value by value."""
    odd = toy_program(layers=1, width=32, vocab=128, context=128)
    profile = calibrated()
    op = next(op for op in odd.ops if isinstance(op, Attention))
    assert op.head_dim == 8
    roofline = Roofline(odd, profile, profile.mode())
    near, far = (roofline.rest(KV, [Step(1, n, False)]) for n in (10, 20))
    assert far - near == pytest.approx(10e-9 * (4 * (16 * 0.125 + 1.0) + 2 * (4.0 + 8 * 2.0)))


def test_small_models_are_read_from_the_cache() -> None:
    plans = tensors("int8_row")
    nbytes = weights_read(PROGRAM, plans)
    step = [Step(1, 0, False)]
    times = {
        limit: timer(PROGRAM, plans, KV, p, p.mode())(step)
        for limit in (nbytes - 1, nbytes)
        for p in [calibrated(cache_bytes=limit)]
    }
    head = packed_nbytes("int8_row", "n16k4", 128, 64)  # a step without logits does not read it
    row = get_format("int8_row").nbytes(1, 64)
    saved = (nbytes - head + row) / 10e9 * 0.75
    assert times[nbytes - 1] - times[nbytes] == pytest.approx(saved, rel=1e-9)


def test_weights_that_stay_in_part_are_read_in_part_from_memory() -> None:
    plans = tensors("int8_row")
    nbytes = weights_read(PROGRAM, plans)
    step = [Step(1, 0, False)]

    def seconds(least: int, most: int) -> float:
        profile = calibrated(cache_bytes=least, stream_bytes=most)
        return timer(PROGRAM, plans, KV, profile, profile.mode())(step)

    all_kept, none = seconds(nbytes, nbytes), seconds(0, nbytes - 1)
    assert seconds(nbytes // 8, 2 * nbytes) == pytest.approx(
        0.25 * all_kept + 0.75 * none, rel=1e-3
    )  # a quarter of the way, by the logarithm
    assert seconds(nbytes - 300, nbytes) == pytest.approx(none)
    assert seconds(nbytes, 0) == all_kept < none  # a profile that says no more than the one size


def test_breaks_cost_stages_where_codes_differ() -> None:
    profile = calibrated()
    roofline = Roofline(PROGRAM, profile, profile.mode())
    once = [Step(1, 0, True)]
    assert roofline.breaks(("int8_row", "int8_row", "int8_row"), once) == 0.0
    assert roofline.breaks(("f16", "nf4_g64"), once) == 0.0  # neither quantizes its input
    assert roofline.breaks(("int8_row_o128", "int8_row_o128"), once) == pytest.approx(6e-6)
    assert roofline.breaks(("int8_row", "f16"), once) == pytest.approx(3e-6)
    assert roofline.breaks(("f16", "int8_row"), once) == pytest.approx(6e-6)  # and another quantization
    assert roofline.breaks(("int8_row", "int4_g32", "int8_row"), once * 4) == pytest.approx(4 * 12e-6)
    chunk = [Step(33, 0, True)]  # another quantization takes up each of its tokens again
    assert roofline.breaks(("int8_row", "f16"), chunk) == pytest.approx(3e-6)
    assert roofline.breaks(("f16", "int8_row"), chunk) == pytest.approx(6e-6 + 32 * 0.25e-6)
    assert (
        Roofline(PROGRAM, load_profile("cpu"), load_profile("cpu").mode()).breaks(("f16", "int8_row"), once)
        == 0
    )


def test_runs_are_the_linears_that_read_one_buffer() -> None:
    runs = list(linear_runs(PROGRAM))
    assert runs[:4] == [
        ("layers.0.q", "layers.0.k", "layers.0.v"),
        ("layers.0.o",),
        ("layers.0.gate", "layers.0.up"),
        ("layers.0.down",),
    ]
    assert sum(len(run) for run in runs) == sum(isinstance(op, Linear) for op in PROGRAM.ops)
    # q k v, attention, o, gate up, down of each layer, and the head; and what comes before each
    assert unbroken_stages(PROGRAM) == 2 * (2 * 5 + 1)


def test_every_format_has_a_family() -> None:
    assert family("f16") == family("nf4_g64") == ("float", None)
    assert len({family("int4_g32"), family("int4_g64"), family("int8_row"), family("f16")}) == 4
    for fmt in FORMATS:
        assert (family(fmt) == ("float", None)) == (get_format(fmt).kind != "int")


def test_the_first_token_counts_chunks_and_the_request() -> None:
    profile = calibrated()
    shape = StepShape(context=128, sequences=1, tokens=32, logits=1)
    plans = tensors("f16")
    seconds = timer(PROGRAM, plans, KV, profile, profile.mode())
    found = predict(PROGRAM, plans, KV, shape, profile, profile.mode())
    assert found.prompt_tokens == 128
    steps = prompt_steps(shape, 128)
    assert [(s.tokens, s.before, s.head) for s in steps] == [
        (32, 0, False),
        (32, 32, False),
        (32, 64, False),
        (32, 96, True),
    ]
    assert found.first_token_ms == pytest.approx(1e3 * (100e-6 + sum(seconds([s]) for s in steps)))
    assert found.decode_tokens_per_s == pytest.approx(1 / seconds([Step(1, 64, True)]))


def test_a_format_that_was_not_measured_has_the_peak_s_share() -> None:
    profile = calibrated(formats={})  # and none to take a row's cost from
    roofline = Roofline(PROGRAM, profile, profile.mode())
    rate = profile.mode().bandwidth_gbps * 1e9 * profile.efficiency.bandwidth
    nbytes = packed_nbytes("f16", "n16", 64, 64)
    found = roofline.tensor("layers.0.q", TensorPlan("f16", "n16"), [Step(1, 0, True)])
    assert found == pytest.approx(nbytes / rate)


def test_a_format_that_takes_long_to_decode_reads_at_its_share_of_the_bandwidth() -> None:
    """Until it is measured; and others at all of it."""
    profile = load_profile("cpu")
    slow = msgspec.structs.replace(profile.efficiency, formats={"tcq4_g64": 0.25})

    def seconds(fmt: str, efficiency: Efficiency) -> float:
        device = msgspec.structs.replace(profile, efficiency=efficiency)
        roofline = Roofline(PROGRAM, device, device.mode())
        return roofline.tensor("layers.0.q", TensorPlan(fmt, "n16k4"), [Step(1, 0, True)])

    even = msgspec.structs.replace(profile.efficiency, formats={})
    assert seconds("tcq4_g64", slow) == pytest.approx(4 * seconds("tcq4_g64", even))
    assert seconds("int4_g64", slow) == seconds("int4_g64", even)
    assert profile.efficiency.formats["tcq2_g64"] < 1
