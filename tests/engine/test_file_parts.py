"""Parts beside the language part, and adapters: in and out of a file, and what does not go together."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
from forged_file import rewrite
from toy_engine import (
    ADAPTED,
    BLOBS,
    SCALE,
    toy_adapter,
    toy_manifest,
    toy_origins,
    toy_plan,
    toy_planes,
    toy_program,
    write_toy,
)

from builders.sources.medusa import head_program
from edge_runtime.engine.file import read_engine
from edge_runtime.engine.manifest import Manifest, PartEntry, medusa_parts
from edge_runtime.engine.proof import check_manifest
from edge_runtime.engine.writer import EngineWriter
from edge_runtime.errors import BadEngineFile


def test_adapters_are_views_of_the_file(tmp_path: Path) -> None:
    write_toy(tmp_path / "toy.edge")
    with read_engine(tmp_path / "toy.edge") as engine:
        part, got = engine.part("language"), engine.adapter("tidy")
        want = toy_adapter(part.program)
        assert set(got) == set(want) == set(ADAPTED)
        for name, update in got.items():
            spec = part.program.tensors[name]
            assert (update.a.shape, update.b.shape) == ((4, spec.cols), (spec.rows, 4))
            assert (update.rank, update.scale) == (4, SCALE)
            for side in ("a", "b"):
                array = getattr(update, side)
                assert array.dtype == np.float16 and array.tobytes() == getattr(want[name], side).tobytes()
                assert not array.flags.writeable and not array.flags.owndata and array.flags.c_contiguous
        assert part.origins == toy_origins(part.program)
        assert (part.origins["layers.1.up"].key, part.origins["layers.1.up"].row) == (
            "model.layers.1.mlp.gate_up_proj",
            64,
        )
        with pytest.raises(BadEngineFile, match="no adapter 'tiddy'; did you mean 'tidy'"):
            engine.adapter("tiddy")


def companions() -> tuple[Manifest, dict[str, np.ndarray]]:
    """A target with a draft and two Medusa heads beside it."""
    programs = {
        "language": toy_program(),
        "draft": toy_program(layers=1, width=16),
        "medusa-1": head_program(32, 64, 64),
        "medusa-2": head_program(32, 64, 64),
    }
    parts, planes = {}, {}
    for name, program in programs.items():
        parts[name] = PartEntry(program=program, plan=toy_plan(program))
        planes |= {f"{name}/{plane}": array for plane, array in toy_planes(program, parts[name].plan).items()}
    plan = parts["language"].plan
    beside = sum(parts[name].plan.memory.need for name in programs if name != "language")
    plan = msgspec.structs.replace(plan, memory=msgspec.structs.replace(plan.memory, draft=beside))
    parts["language"] = msgspec.structs.replace(parts["language"], plan=plan)
    return toy_manifest(parts), planes | {f"blob/{n}": np.frombuffer(b, np.uint8) for n, b in BLOBS.items()}


def write_parts(path: Path, manifest: Manifest, planes: dict[str, np.ndarray]) -> Manifest:
    with EngineWriter(path) as writer:
        for name, array in planes.items():
            writer.add(name, array)
        return writer.finish(manifest)


def test_draft_and_heads_go_in_and_come_out(tmp_path: Path) -> None:
    manifest, planes = companions()
    write_parts(tmp_path / "m.edge", manifest, planes)
    with read_engine(tmp_path / "m.edge") as engine:
        assert list(engine.manifest.parts) == ["language", "draft", "medusa-1", "medusa-2"]
        assert medusa_parts(engine.manifest.parts) == ["medusa-1", "medusa-2"]
        for name in engine.manifest.parts:
            for tensor, packed in engine.part(name).weights.items():
                for plane, array in packed.planes.items():
                    assert array.tobytes() == planes[f"{name}/{tensor}#{plane}"].tobytes()


def test_ten_heads_are_in_the_order_of_their_numbers() -> None:
    names = [f"medusa-{k}" for k in range(1, 12)]
    assert medusa_parts(sorted(names)) == names


def change_draft(text: str, old: str, new: str) -> str:
    """Replace the last occurrence before the first head: in the draft."""
    end = text.index('"medusa-1":')
    at = text.rindex(old, 0, end)
    return text[:at] + new + text[at + len(old) :]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"pages":8', '"pages":9', "the memory plan says"),
        ('"page_tokens":16,"pages":8', '"page_tokens":32,"pages":4', "part 'draft': kv.pages is 4, the"),
        (
            '"context":64,"sequences"',
            '"context":63,"sequences"',
            "part 'draft': step.context is 63, the lang",
        ),
        ('"sequences":2', '"sequences":3', "part 'draft': step.sequences is 3, the language part has 2"),
        ('"buffers":65536', '"buffers":65537', "bytes of draft, the parts beside it take"),
    ],
)
def test_a_draft_that_does_not_go_with_its_target_is_refused(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    path = tmp_path / "m.edge"
    write_parts(path, *companions())
    rewrite(path, lambda text: change_draft(text, old, new))
    with pytest.raises(BadEngineFile, match=message):
        read_engine(path)


def test_companions_need_their_target_and_its_vocabulary(tmp_path: Path) -> None:
    manifest, _ = companions()
    draft = manifest.parts["draft"]
    planes = dict.fromkeys((n for n in companions()[1]), "0" * 64)

    def refused(parts: dict[str, PartEntry], message: str) -> None:
        with pytest.raises(BadEngineFile, match=message):
            check_manifest(msgspec.structs.replace(manifest, parts=parts, planes=planes))

    refused({"draft": draft}, "part 'draft' needs a part 'language'")
    program = toy_program(layers=1, width=16, vocab=65)
    other = PartEntry(program=program, plan=toy_plan(program))
    refused(manifest.parts | {"draft": other}, "part 'draft': vocab_size is 65, the language part has 64")
    gap = {n: p for n, p in manifest.parts.items() if n != "medusa-1"}
    refused(gap, "the Medusa heads are medusa-2…, expected medusa-1, medusa-2 and so on")
    refused(manifest.parts | {"medusa-1": draft}, "part 'medusa-1': a Medusa head begins with an input op")
    narrow = head_program(16, 64, 64)
    head = PartEntry(program=narrow, plan=toy_plan(narrow))
    refused(
        manifest.parts | {"medusa-2": head}, "part 'medusa-2': the input's width is 16, the language part"
    )
    many = {f"medusa-{k}": manifest.parts["medusa-1"] for k in range(1, 18)}
    refused({"language": manifest.parts["language"], **many}, "to at most medusa-16")
