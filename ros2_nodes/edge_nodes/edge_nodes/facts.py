"""What an opened engine is, for get_metadata and the diagnostics."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec

from edge_nodes.engine import Facts
from edge_runtime import Session


def facts_of(session: Session, path: Path) -> Facts:
    manifest, quality = session.manifest, session.manifest.quality
    return Facts(
        name=manifest.name,
        model=manifest.provenance.source,
        model_type=manifest.provenance.model_type,
        backend=session.backend,
        profile=manifest.fingerprint.profile,
        digest=hashlib.sha256(msgspec.json.encode(manifest.planes)).hexdigest(),
        engine_path=str(path),
        context=session.context,
        parallel=session.step_shape.sequences,
        vocabulary=session.tokenizer.vocabulary.size,
        cache_type_k=session.kv.k,
        cache_type_v=session.kv.v,
        speculative=session.speculate,
        adapters=tuple(session.adapters),
        has_chat=session.has_chat,
        memory_planned=session.memory.need,
        memory_used=session.memory_used,
        bits_per_weight=0.0 if quality is None else quality.bits_per_weight,
        perplexity=0.0 if quality is None else quality.perplexity,
        perplexity_f32=0.0 if quality is None else quality.perplexity_f32,
        notices=session.notices,
    )
