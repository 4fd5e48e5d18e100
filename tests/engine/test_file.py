"""Engine files: what goes in comes out, in place, as a valid safetensors file; and only whole files open."""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from forged_file import forge, rewrite
from toy_engine import BLOBS, toy_manifest, toy_plan, toy_planes, toy_program, write_toy

from edge_runtime.engine import header as layout
from edge_runtime.engine import packing
from edge_runtime.engine.file import read_engine
from edge_runtime.engine.formats import FORMATS, get_format
from edge_runtime.engine.header import header_reserve
from edge_runtime.engine.manifest import Manifest, PartEntry
from edge_runtime.engine.proof import check_manifest
from edge_runtime.engine.writer import EngineWriter
from edge_runtime.errors import BadEngineFile, BuildError


@pytest.fixture
def engine_path(tmp_path: Path) -> Path:
    write_toy(tmp_path / "toy.edge")
    return tmp_path / "toy.edge"


@pytest.mark.parametrize("fmt", sorted(set(FORMATS) - {"f32"}))
def test_what_goes_in_comes_out(tmp_path: Path, fmt: str) -> None:
    manifest = write_toy(tmp_path / "toy.edge", fmt=fmt)
    program, plan = manifest.parts["language"].program, manifest.parts["language"].plan
    want = toy_planes(program, plan)
    with read_engine(tmp_path / "toy.edge") as engine:
        assert engine.manifest == manifest
        part = engine.part("language")
        assert (part.program, part.plan) == (program, plan)
        assert set(part.weights) == set(program.tensors)
        seen = set()
        for name, tensor in part.weights.items():
            assert (tensor.format, tensor.packing) == (plan.tensors[name].format, plan.tensors[name].packing)
            for plane, array in tensor.planes.items():
                source = want[f"{name}#{plane}"]
                assert array.dtype == source.dtype and array.tobytes() == source.tobytes()
                assert not array.flags.writeable and not array.flags.owndata
                assert array.ctypes.data % 64 == 0  # used straight from the map
                seen.add(f"{name}#{plane}")
            coded = packing.unpack(tensor.format, tensor.packing, tensor.planes, tensor.rows, tensor.cols)
            assert get_format(tensor.format).decode(coded, tensor.rows, tensor.cols).dtype == np.float32
        assert seen == set(want)
        assert {name: bytes(engine.blob(name)) for name in BLOBS} == BLOBS


def test_it_is_a_safetensors_file_whose_data_starts_on_a_page(engine_path: Path) -> None:
    manifest = read_engine(engine_path).manifest
    raw = engine_path.read_bytes()
    (n,) = struct.unpack("<Q", raw[:8])
    assert (8 + n) % 4096 == 0
    head = json.loads(raw[8 : 8 + n])
    meta = head.pop("__metadata__")
    with safetensors.safe_open(engine_path, "numpy") as container:
        assert container.metadata() == meta
        assert set(container.keys()) == set(head) == set(manifest.planes)
    tensors = safetensors.numpy.load_file(engine_path)
    at = 0
    for name, row in head.items():
        begin, end = row["data_offsets"]
        assert begin == at and begin % 64 == 0 and end > begin
        assert row["dtype"] == "U8" and row["shape"] == [end - begin]
        stored = tensors[name].tobytes()
        assert hashlib.sha256(stored).hexdigest() == manifest.planes[name]
        at = end
    assert 8 + n + at == len(raw)
    plain = raw[8 : 8 + n].replace(meta["edge_sha256"].encode(), b"0" * 64)
    assert hashlib.sha256(plain).hexdigest() == meta["edge_sha256"]
    assert msgspec.json.decode(meta["edge"], type=Manifest) == manifest


def test_the_manifest_is_ascii_json_equal_to_msgspecs(engine_path: Path) -> None:
    manifest = read_engine(engine_path).manifest
    text = layout.manifest_json(manifest)
    assert text.isascii()
    assert json.loads(text) == json.loads(msgspec.json.encode(manifest))
    plain = msgspec.structs.replace(
        manifest, provenance=msgspec.structs.replace(manifest.provenance, recipe={"weights": "int4_g32"})
    )
    assert layout.manifest_json(plain) == msgspec.json.encode(plain)
    empty = msgspec.structs.replace(plain, parts={}, planes={}, blobs={}, quality=None)
    assert layout.manifest_json(empty) == msgspec.json.encode(empty)


def test_a_header_beyond_its_reserve_moves_the_data(tmp_path: Path) -> None:
    program = toy_program(width=256, vocab=4096)  # planes of 1 MiB: several pieces are moved
    plan = toy_plan(program, "int8_row")
    files = []
    for reserve in (0, 256 * 1024):
        path = tmp_path / f"{reserve}.edge"
        with EngineWriter(path, reserve) as writer:
            for plane, array in toy_planes(program, plan).items():
                writer.add(f"language/{plane}", array)
            for blob, data in BLOBS.items():
                writer.add(f"blob/{blob}", data)
            sample = writer.planes()["language/embed#q"]
            assert sample[:64].tobytes() == toy_planes(program, plan)["embed#q"].tobytes()[:64]
            writer.finish(toy_manifest({"language": PartEntry(program=program, plan=plan)}))
        files.append(path)
    small, large = (read_engine(path) for path in files)
    assert small.manifest == large.manifest
    assert small.file_nbytes < large.file_nbytes
    weights = large.part("language").weights
    for name, tensor in small.part("language").weights.items():
        for plane, array in tensor.planes.items():
            assert array.tobytes() == weights[name].planes[plane].tobytes()


def test_the_helper_reserves_enough_for_large_models() -> None:
    for layers in (2, 40):
        program = toy_program(layers=layers)
        plan = toy_plan(program)
        manifest = toy_manifest({"language": PartEntry(program=program, plan=plan)})
        names = [f"language/{n}#q" for n in program.tensors] + [f"language/{n}#s" for n in program.tensors]
        bare = len(layout.manifest_json(manifest))
        full = msgspec.structs.replace(manifest, planes={n: "ab" * 32 for n in names})
        needed = len(layout.render(full, dict.fromkeys(names, 1 << 24)))
        assert needed <= header_reserve(len(names), bare) <= 4 << 20


def test_views_outlive_the_handle_and_a_closed_engine_says_so(engine_path: Path) -> None:
    engine = read_engine(engine_path)
    q = engine.part("language").weights["layers.0.q"].planes["q"]
    before = q.tobytes()
    engine.close()
    assert q.tobytes() == before
    with pytest.raises(BadEngineFile, match="the engine is closed; open it again"):
        engine.part("language")


def test_replacing_the_file_changes_nothing_for_an_open_engine(engine_path: Path) -> None:
    engine = read_engine(engine_path)
    old_inode, q = engine_path.stat().st_ino, engine.part("language").weights["layers.0.q"].planes["q"]
    before = q.tobytes()
    write_toy(engine_path, seed=2)
    assert engine_path.stat().st_ino != old_inode
    assert q.tobytes() == before
    assert read_engine(engine_path).part("language").weights["layers.0.q"].planes["q"].tobytes() != before


def test_unknown_part_or_blob_names_the_nearest(engine_path: Path) -> None:
    with read_engine(engine_path) as engine:
        with pytest.raises(BadEngineFile, match="no part 'langauge'; did you mean 'language'"):
            engine.part("langauge")
        with pytest.raises(BadEngineFile, match=r"no blob 'tokeniser\.json'; did you mean 'tokenizer\.json'"):
            engine.blob("tokeniser.json")


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.edge").touch()
    (tmp_path / "zeros.edge").write_bytes(bytes(8192))
    os.mkfifo(tmp_path / "fifo.edge")
    (tmp_path / "loop.edge").symlink_to(tmp_path / "loop.edge")
    (tmp_path / "dangling.edge").symlink_to(tmp_path / "nowhere")
    safetensors.numpy.save_file({"w": np.zeros((64, 64), np.float32)}, tmp_path / "other.edge")
    cases = {
        "missing.edge": "no such file",
        "dangling.edge": "no such file",
        "empty.edge": "truncated: 0 bytes",
        "zeros.edge": "not an engine file",
        "fifo.edge": "not a regular file",
        "loop.edge": "cannot be read: Too many levels",
        "other.edge": "not an engine file",
        ".": "not a regular file",
        "/dev/zero": "not a regular file",
        "a\0b": "cannot be opened",
    }
    for name, message in cases.items():
        with pytest.raises(BadEngineFile, match=message):
            read_engine(tmp_path / name)


def test_a_flipped_bit_of_any_plane_is_found_unless_asked_not_to_look(engine_path: Path) -> None:
    engine = read_engine(engine_path)
    start, good = engine.file_nbytes - engine.nbytes, engine_path.read_bytes()
    at = start
    for name, size in engine.sizes().items():
        for offset in (at, at + size - 1):
            bad = bytearray(good)
            bad[offset] ^= 1
            engine_path.write_bytes(bad)
            with pytest.raises(BadEngineFile, match=f"plane '{name}' does not match its digest"):
                read_engine(engine_path)
            read_engine(engine_path, verify=False)
        at += layout.padded(size)
    assert at == len(good)


def test_large_files_are_hashed_in_threads_and_damage_is_found(tmp_path: Path) -> None:
    program = toy_program(width=512, vocab=4096)
    plan = toy_plan(program, "int8_row")
    path = tmp_path / "large.edge"
    with EngineWriter(path) as writer:
        for plane, array in toy_planes(program, plan).items():
            writer.add(f"language/{plane}", array)
        for blob, data in BLOBS.items():
            writer.add(f"blob/{blob}", data)
        writer.finish(toy_manifest({"language": PartEntry(program=program, plan=plan)}))
    assert read_engine(path).nbytes > 1 << 20
    with path.open("r+b") as file:
        file.seek(-100_000, os.SEEK_END)
        byte = file.read(1)
        file.seek(-100_000, os.SEEK_END)
        file.write(bytes([byte[0] ^ 0x80]))
    with pytest.raises(BadEngineFile, match="does not match its digest; the file is damaged"):
        read_engine(path)


def test_padding_must_be_zero_even_under_a_right_digest(engine_path: Path) -> None:
    engine = read_engine(engine_path)
    raw = bytearray(engine_path.read_bytes())
    name = "blob/chat_template"  # 14 bytes, 50 of padding, the last in the file
    old = engine.manifest.planes[name]
    raw[-1] = 1
    engine_path.write_bytes(raw)
    new = hashlib.sha256(raw[-64:]).hexdigest()
    rewrite(engine_path, lambda text: text.replace(old, new))
    with pytest.raises(BadEngineFile, match="'blob/chat_template' has padding that is not zero"):
        read_engine(engine_path)


def test_rewriting_nothing_keeps_the_file_readable(engine_path: Path) -> None:
    before = engine_path.read_bytes()
    rewrite(engine_path, lambda text: text)
    read_engine(engine_path)
    assert engine_path.read_bytes()[-4096:] == before[-4096:]


REFUSALS = {
    '"schema":5,': ('"schema":6,', "made by a newer version .schema 6, this one reads 5.; update"),
    '"schema":5,"name"': (
        '"schema":4,"name"',
        "an older version .schema 4, this one reads 5.; build it again",
    ),
    '"name":"toy",': ('"name":"toy","nmae":"x",', "unknown field `nmae`"),
    '"name":"toy",\n': ('"name":"to\\ny",', "the manifest is not valid"),
    '"abi":"': ('"abi":"0000000000000000","x":"', "unknown field"),
    '"name":"toy"': ('"name":"toy","name":"toy"', "is not what its manifest asks for"),
    '"max_context":64': ('"max_context":64,"max_context":64', "is not what its manifest asks for"),
    '"q":32': ('"q":32,"q":32', "is not what its manifest asks for"),
    '"bos":1': ('"bos": 1', "is not what its manifest asks for"),
    '"perplexity":12.5': ('"perplexity":1.25e1', "is not what its manifest asks for"),
    '"kl_mean":0.01': ('"kl_mean":1e999', "the manifest is not valid"),
    '"kl_mean":0.01,': ('"kl_mean":null,', "the manifest is not valid"),
    '"role":"matrix"': ('"role":"matriz"', "the manifest is not valid"),
    '"op":"embed"': ('"op":"python"', "the manifest is not valid"),
    '"layers.0.q":{"format":"int4_g32"': ('"layers.0.q":{"format":"int4_g33"', "unknown format 'int4_g33'"),
    '"layers.0.k":{"format":"int4_g32","packing":"n16k4"': (
        '"layers.0.k":{"format":"int4_g32","packing":"n16"',
        "int4_g32 has no packing 'n16'",
    ),
    '"norm":{"format":"f32"': ('"norm":{"format":"f16"', "vector 'norm' is 1 rows of f16 rows"),
    '"layers.0.q":{"format":"int4_g32","packing":"n16k4"},': ("", "the plan has no format for tensor"),
    '"inv_freq":{"format"': ('"inv_frex":{"format"', "names tensor 'inv_frex'; did you mean 'inv_freq'"),
    '"page_tokens":16': ('"page_tokens":17', "page_tokens is 17"),
    '"pages":8': ('"pages":3', "3 pages of 16 tokens cannot hold a context of 64"),
    '"k":"int8"': ('"k":"int9"', "unknown KV format 'int9'; did you mean 'int8'"),
    '"context":64,"sequences"': ('"context":65,"sequences"', "step.context is 65, expected 1 to 64"),
    '"sequences":2': ('"sequences":0', "step.sequences is 0"),
    '"tokens":16,': ('"tokens":70000,', "step.tokens is 70000, expected 1 to 65536"),
    '"logits":2}': ('"logits":-1}', "step.logits is -1"),
    '"kv":12288': ('"kv":12289', "12289 of KV cache, the program takes"),
    '"buffers":65536': ('"buffers":-1', "memory.buffers is -1"),
    '"first_token_ms":2.5': ('"first_token_ms":-2.5', "prediction -2.5"),
    '"bos":1,': ('"bos":64,', "vocabulary.bos has token id 64, expected 0 to 63"),
    '"eos":[2]': ('"eos":[2,-3]', "vocabulary.eos has token id -3"),
    '"size":64': ('"size":0', "vocabulary.size is 0"),
    '"prompt":[1,5,9]': ('"prompt":[]', "the known answer has no prompt"),
    '"answer":[3,4]': ('"answer":[3,400]', "known_answer has token id 400"),
    '"tokenizer.json":17': ('"tokenizer.json":65', "is not what its manifest asks for"),
    '"chat_template":14': ('"chat_template":0', "length of blob 'chat_template' is 0"),
    '"parts":{"language":': ('"parts":{"adapter.x":', "no part's name may begin with 'adapter.'"),
    '"parts":{"language"': ('"parts":{"blob"', "no part may be named 'blob'"),
    '"source":"toy"': ('"source":"toy' + "x" * 20000 + '"', "longer than 8192 bytes"),
    '"vocab_size":64': ('"vocab_size":' + "9" * 5000, "the manifest is not valid|vocab_size"),
    '"adapters":{"tidy":{"part":"language"': (
        '"adapters":{"tidy":{"part":"langauge"',
        "adapter 'tidy': no part 'langauge'; did you mean 'language'",
    ),
    '"targets":{"layers.0.q"': (
        '"targets":{"layers.9.q"',
        "adapter 'tidy': no tensor 'layers.9.q'; did you mean 'layers.[01].q'",
    ),
    '"targets":{"layers.0.q":': ('"targets":{"embed":', "'embed' has the role embedding, expected matrix or"),
    '"rank":4': ('"rank":0', "rank of 'layers.0.q' is 0, expected 1 to 512"),
    '"rank":4,': ('"rank":513,', "rank of 'layers.0.q' is 513"),
    '"rank":4,"scale"': ('"rank":5,"scale"', "the plan says 3584 bytes of adapters, they take 3648"),
    '"scale":0.5}': ('"scale":-1e31}', "scale of 'layers.0.q' is -1e.31, expected at most 1e.30"),
    '"adapters":3584': ('"adapters":0', "the plan says 0 bytes of adapters"),
    '"adapter.tidy/layers.0.q.a#w"': (
        '"adapter.tidy/layers.0.q.c#w"',
        "adapter 'tidy': plane 'adapter.tidy/layers.0.q.a#w' has no digest",
    ),
    '"adapters":{"tidy"': ('"adapters":{"t dy"', "the manifest is not valid"),
    '"origins":{"head"': ('"origins":{"heap"', "an origin names tensor 'heap'; did you mean 'head'"),
    '"origins":{"head":': ('"origins":{"norm":', "'norm' has an origin and the role vector"),
    '"key":"lm_head"': ('"key":"lm head"', "the origin of 'head' is 'lm head', which is no tensor's name"),
    '"key":"lm_head","row":0': ('"key":"lm_head","row":-1', "the origin of 'head' is row -1, expected 0 to"),
    '"draft":0': ('"draft":1', "says 1 bytes of draft, the parts beside it take 0"),
    '"buffers":{': ('"buffers":{"a b":1,', "'a b' is no name of a tensor or buffer"),
}


@pytest.mark.parametrize("old", REFUSALS, ids=lambda old: old[:24])
def test_a_forged_manifest_is_refused_by_name(engine_path: Path, old: str) -> None:
    new, message = REFUSALS[old]
    old = old.strip("\n")

    def change(text: str) -> str:
        assert old in text
        return text.replace(old, new, 1)

    rewrite(engine_path, change)
    with pytest.raises(BadEngineFile, match=message):
        read_engine(engine_path)


def test_missing_extra_and_reordered_planes_are_refused(engine_path: Path) -> None:
    engine = read_engine(engine_path)
    data = engine_path.read_bytes()[engine.file_nbytes - engine.nbytes :]
    manifest = engine.manifest
    name = "language/layers.0.q#q"
    fewer = {k: v for k, v in manifest.planes.items() if k != name}
    more = manifest.planes | {"language/layers.0.q#extra": "0" * 64}
    for planes, message in ((fewer, f"'{name}' has no digest"), (more, "#extra' belongs to nothing")):
        with pytest.raises(BadEngineFile, match=message):
            check_manifest(msgspec.structs.replace(manifest, planes=planes))
    first, *rest = manifest.planes.items()
    forge(engine_path, msgspec.structs.replace(manifest, planes=dict([*rest, first])), data)
    with pytest.raises(BadEngineFile, match="does not match its digest"):
        read_engine(engine_path)


class TestWriterRefuses:
    def write(
        self,
        path: Path,
        change: Callable[[Manifest], Manifest] | None = None,
        *,
        skip: str = "",
        extra: str = "",
    ) -> None:
        program = toy_program()
        plan = toy_plan(program)
        manifest = toy_manifest({"language": PartEntry(program=program, plan=plan)})
        with EngineWriter(path) as writer:
            for plane, array in toy_planes(program, plan).items():
                if plane != skip:
                    writer.add(f"language/{plane}", array)
            for blob, data in BLOBS.items():
                writer.add(f"blob/{blob}", data)
            if extra:
                writer.add(extra, b"123")
            writer.finish(change(manifest) if change else manifest)

    def refused(
        self, path: Path, message: str, change: Callable[[Manifest], Manifest] | None = None, **options: str
    ) -> None:
        path.write_bytes(b"old")
        with pytest.raises(BuildError, match=message):
            self.write(path, change, **options)
        assert path.read_bytes() == b"old"
        assert os.listdir(path.parent) == [path.name]

    def test_what_would_not_open(self, tmp_path: Path) -> None:
        path = tmp_path / "m.edge"
        self.refused(path, "'language/head#q' has no digest", skip="head#q")
        self.refused(path, "'blob/extra' belongs to nothing", extra="blob/extra")

        def nan(manifest: Manifest) -> Manifest:
            assert manifest.quality is not None
            return msgspec.structs.replace(
                manifest, quality=msgspec.structs.replace(manifest.quality, perplexity=math.nan)
            )

        self.refused(path, r"quality.perplexity", nan)
        self.refused(
            path,
            "bos has token id 99",
            lambda m: msgspec.structs.replace(m, vocabulary=msgspec.structs.replace(m.vocabulary, bos=99)),
        )
        self.refused(
            path,
            "17 bytes, expected 16",
            lambda m: msgspec.structs.replace(m, blobs=m.blobs | {"tokenizer.json": 16}),
        )
        self.refused(
            path,
            "the header takes",
            lambda m: msgspec.structs.replace(
                m,
                provenance=msgspec.structs.replace(
                    m.provenance, recipe={str(i): "x" * 4000 for i in range(1100)}
                ),
            ),
        )

    def test_an_integer_where_a_float_belongs_is_written_as_a_float(self, tmp_path: Path) -> None:
        def whole(manifest: Manifest) -> Manifest:
            assert manifest.quality is not None
            return msgspec.structs.replace(
                manifest, quality=msgspec.structs.replace(manifest.quality, perplexity=5)
            )

        self.write(tmp_path / "m.edge", whole)
        quality = read_engine(tmp_path / "m.edge").manifest.quality
        assert quality is not None and quality.perplexity == 5.0

    def test_a_name_twice_an_empty_plane_and_a_closed_writer(self, tmp_path: Path) -> None:
        with EngineWriter(tmp_path / "m.edge") as writer:
            writer.add("a", b"1")
            with pytest.raises(BuildError, match="'a' is written twice"):
                writer.add("a", b"1")
            with pytest.raises(BuildError, match="'b' is empty"):
                writer.add("b", b"")
            assert writer.nbytes == 64
        with pytest.raises(BuildError, match="not open; use it in a with block"):
            writer.add("c", b"1")
        assert os.listdir(tmp_path) == []

    def test_places_that_cannot_be_written(self, tmp_path: Path) -> None:
        with pytest.raises(BuildError, match="is a folder; name the engine file"), EngineWriter(tmp_path):
            pass
        with pytest.raises(BuildError, match="No such file"), EngineWriter(tmp_path / "no" / "m.edge"):
            pass

    def test_leaving_with_an_error_leaves_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(ZeroDivisionError), EngineWriter(tmp_path / "m.edge") as writer:
            writer.add("a", b"1")
            assert len(os.listdir(tmp_path)) == 1
            raise ZeroDivisionError
        assert os.listdir(tmp_path) == []
