"""Child of test_calibrate: calibrates MODEL into FOLDER and prints its peak memory above the start, in bytes.

argv: warm-up model (loads every library and code path first), model, folder, samples, tokens of a sample.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from peak_child import peak

from builders.calibrate import CalibrationOptions, calibrate
from builders.corpus import Corpus
from builders.parts import Extras, open_contents


def run(model: Path, folder: Path, samples: int, length: int) -> None:
    with open_contents(model, Extras(), None) as contents:
        target = contents.target
        ids = np.random.default_rng(0).integers(3, target.program.vocab_size, (samples, length))
        corpus = Corpus("noise", ids.astype(np.int32))
        digests = target.source.sha256()
        calibrate(
            target.weights, corpus, folder, digests=digests, options=CalibrationOptions(cores=1)
        ).close()


def main(warm: Path, model: Path, folder: Path, samples: int, length: int) -> None:
    run(warm, folder.with_name("warm"), 2, 16)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counter starts again
    start = peak()
    run(model, folder, samples, length)
    print(peak() - start)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))
