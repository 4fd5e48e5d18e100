"""Verdicts on a seeded corpus of forged engines, as JSON: run with and without -O, they must be equal."""

import hashlib
import json
import random
import sys
from pathlib import Path

from specimen import Specimen, mutate

seed, count, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
rng = random.Random(seed)
accepted = 0
messages = hashlib.sha256()
with Specimen(folder) as specimen:
    for i in range(count):
        piece = mutate(rng, specimen.text)
        engine, message = specimen.verdict(specimen.forged(piece) if i % 3 else mutate(rng, specimen.good))
        accepted += engine is not None
        messages.update(message.encode("utf-8", "backslashreplace") + b"\n")
print(
    json.dumps(
        {
            "debug": __debug__,
            "accepted": accepted,
            "refused": count - accepted,
            "messages": messages.hexdigest(),
        }
    )
)
