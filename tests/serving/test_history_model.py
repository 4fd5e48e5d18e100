"""The fake executor keeps the seam's promises, or the tests that lean on it would prove nothing."""

from __future__ import annotations

import numpy as np
from history_model import HistoryExecutor, adapted_continuation, continuation, next_token

from edge_runtime.backends.protocol import StepBatch
from edge_runtime.engine.adapter import LowRank
from edge_runtime.engine.plan import KvPlan, StepShape

VOCAB = 40
TABLE = np.array([[2, 0, 3]], np.int32)


def executor() -> HistoryExecutor:
    kv = KvPlan(k="f16", v="f16", page_tokens=16, pages=4)
    return HistoryExecutor(kv, StepShape(context=48, sequences=2, tokens=32, logits=32), VOCAB)


def i32(values: object) -> np.ndarray:
    return np.asarray(values, np.int32)


def step(tokens: list[int], first: int, **rest: np.ndarray) -> StepBatch:
    count = len(tokens)
    positions = i32(np.arange(first, first + count))
    return StepBatch(i32(tokens), positions, i32([0] * count), TABLE, i32(np.arange(count)), **rest)


def test_a_path_of_a_tree_is_its_plain_sequence_and_moves_to_its_positions() -> None:
    prompt = [5, 9, 7, 8, 6, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20]  # the tree crosses a page
    e = executor()
    e.forward(step(prompt, 0))
    # Row: token, position, parent; two branches, the second of which is accepted
    rows = [(21, 15, -1), (22, 16, 0), (23, 16, 0), (24, 17, 1), (25, 17, 2), (26, 18, 4)]
    tree = StepBatch(
        i32([r[0] for r in rows]),
        i32([r[1] for r in rows]),
        i32([0] * 6),
        TABLE,
        i32(np.arange(6)),
        parents=i32([r[2] for r in rows]),
        places=i32(np.arange(15, 21)),
    )
    got = e.forward(tree).argmax(axis=1)
    paths = ([21], [21, 22], [21, 23], [21, 22, 24], [21, 23, 25], [21, 23, 25, 26])
    assert got.tolist() == [next_token(prompt + path, VOCAB) for path in paths]
    assert len(np.unique(e.hidden)) == 6
    e.move(TABLE[0], i32([17, 19, 20]), i32([16, 17, 18]))
    after = [*prompt, 21, 23, 25, 26]
    assert e.forward(step([27], 19)).argmax() == next_token([*after, 27], VOCAB)
    page = e.read_page(0)
    e.write_page(1, page)
    moved = TABLE.copy()
    moved[0, 1] = 1
    again = StepBatch(i32([27]), i32([19]), i32([0]), moved, i32([0]))
    assert e.forward(again).argmax() == next_token([*after, 27], VOCAB)


def test_an_adapter_changes_the_answer_and_what_is_stored() -> None:
    e = executor()
    number = e.add_adapter({"w": LowRank(np.zeros((1, 1)), np.zeros((1, 1)), 1.0)})
    prompt = [5, 9, 7]
    with_it = int(e.forward(step(prompt, 0, adapters=i32([number])))[-1].argmax())
    assert with_it == adapted_continuation(prompt, 1, VOCAB, number)[0]
    assert with_it != continuation(prompt, 1, VOCAB)[0]
    # A prefix stored with the adapter is not the plain one
    later = int(e.forward(step([8], 3)).argmax())
    assert later != continuation([*prompt, 8], 1, VOCAB)[0]
    e.drop_adapter(number)
    assert e.adapters == {}
