"""KV pages as bytes: what is read from one executor answers in another, of either backend."""

from __future__ import annotations

import numpy as np
import pytest
from cpu_programs import PAGES, ids, llama, step

from edge_runtime.backends.cpu import BACKEND
from edge_runtime.backends.protocol import Backend
from edge_runtime.backends.reference import BACKEND as REFERENCE
from edge_runtime.engine.kv import KV_FORMATS, cache_arrays
from edge_runtime.errors import BackendUnavailable, BadRequest

if not BACKEND.available().ok:
    pytest.skip(BACKEND.available().why, allow_module_level=True)

BOTH = pytest.mark.parametrize("backend", [BACKEND, REFERENCE], ids=["cpu", "reference"])


@BOTH
@pytest.mark.parametrize("kv", KV_FORMATS)
@pytest.mark.parametrize("page_tokens", [16, 32])
def test_pages_survive_as_bytes(backend: Backend, kv: str, page_tokens: int) -> None:
    part = llama("f32", kv=kv, page_tokens=page_tokens, head_dim=20, heads=3, kv_heads=1)
    first, second = backend.load(part), backend.load(part)
    first.forward(step((0, 0, ids(32))))
    size = sum(a.nbytes // part.kv.pages for a in cache_arrays(part.program, part.kv))
    assert first.page_nbytes == size
    for page in PAGES[0]:
        data = first.read_page(page)
        assert data.shape == (size,) and data.dtype == np.uint8
        second.write_page(page, data)
        assert np.array_equal(second.read_page(page), data)
    batch = step((0, 32, ids(9, 2)))
    assert np.array_equal(second.forward(batch), first.forward(batch))
    first.close()
    second.close()


@pytest.mark.parametrize("kv", KV_FORMATS)
def test_both_backends_have_the_same_order(kv: str) -> None:
    part = llama("f32", kv=kv)
    cpu, oracle = BACKEND.load(part), REFERENCE.load(part)
    assert cpu.page_nbytes == oracle.page_nbytes
    oracle.forward(step((0, 0, ids(16))))
    cpu.write_page(PAGES[0][0], oracle.read_page(PAGES[0][0]))
    batch = step((0, 16, ids(4, 2)))
    want = oracle.forward(batch)
    assert np.abs(cpu.forward(batch) - want).max() <= (1e-5 if kv == "f32" else 5e-3) * np.abs(want).max()
    cpu.close()


@BOTH
def test_a_read_page_is_a_copy(backend: Backend) -> None:
    executor = backend.load(llama("f16", kv="int8"))
    executor.forward(step((0, 0, ids(16))))
    data = executor.read_page(PAGES[0][0])
    kept = data.copy()
    executor.forward(step((0, 0, ids(16, 9))))
    assert np.array_equal(data, kept)
    assert not np.array_equal(executor.read_page(PAGES[0][0]), kept)
    executor.close()


@BOTH
def test_bad_pages_are_refused(backend: Backend) -> None:
    executor = backend.load(llama("f16"))
    data = executor.read_page(0)
    for page in (-1, 12):
        with pytest.raises(BadRequest, match=f"page {page} does not exist, the cache has 12"):
            executor.read_page(page)
        with pytest.raises(BadRequest, match=f"page {page} does not exist"):
            executor.write_page(page, data)
    for bad in (data[:-1], data.view(np.int8), data[None], np.append(data, data[:1])):
        with pytest.raises(BadRequest, match=rf"a page is uint8 \({len(data)},\) in this cache"):
            executor.write_page(0, bad)
    executor.close()
    for call in (
        lambda: executor.read_page(0),
        lambda: executor.write_page(0, data),
        lambda: executor.page_nbytes,
        lambda: executor.hidden,
        lambda: executor.copy_page(0, 1),
        lambda: executor.move(np.array(PAGES[0]), np.array([1]), np.array([0])),
    ):
        with pytest.raises(BackendUnavailable, match="closed"):
            call()
