"""The generated C header: compiled as C and C++, it says what the Python records say."""

from __future__ import annotations

import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from edge_runtime.engine.formats import FORMATS, abi_hash
from edge_runtime.engine.formats.c_header import c_header
from edge_runtime.engine.formats.nf4 import NF4
from edge_runtime.engine.kv import K_FORMATS
from edge_runtime.engine.packing import cpu_packing

ROOT = Path(__file__).resolve().parents[2]

READER = r"""
#include <stdio.h>
#include <string.h>
#include "formats.h"
#include "formats.h"
int main(void) {
  printf("abi %llu\n", (unsigned long long)EDGE_FORMAT_ABI);
  for (int i = 0; i < 16; i++) { unsigned u; memcpy(&u, &EDGE_NF4[i], 4); printf("nf4 %08x\n", u); }
  for (int i = 0; i < EDGE_FORMAT_COUNT; i++) {
    struct EdgeFormat f = EDGE_FORMATS[i];
    printf("fmt %s %d %d %d %d %d %d %s\n", f.name, f.group, f.scale_per, f.has_zero,
           f.q_encoding == EDGE_ENC_U4O8, f.scale_encoding == EDGE_ENC_F32, f.pack_group, f.packing);
  }
  for (int i = 0; i < EDGE_KV_COUNT; i++)
    printf("kv %s %s\n", EDGE_KV_FORMATS[i].name, EDGE_FORMATS[EDGE_KV_FORMATS[i].format].name);
  printf("id %s\n", EDGE_FORMATS[EDGE_FMT_INT4_G64_ZP].name);
  return 0;
}
"""


@pytest.mark.parametrize("compiler,suffix", [("g++", "cpp"), ("gcc", "c")])
def test_c_header_compiles_and_says_what_the_records_say(tmp_path: Path, compiler: str, suffix: str) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler} on this machine")
    (tmp_path / "formats.h").write_text(c_header())
    source = tmp_path / f"reader.{suffix}"
    source.write_text(READER)
    standard = "-std=c++17" if suffix == "cpp" else "-std=c11"
    options = [standard, "-Wall", "-Wextra", "-Werror", "-o", str(tmp_path / "reader")]
    subprocess.run([compiler, *options, str(source)], check=True)
    done = subprocess.run([tmp_path / "reader"], check=True, capture_output=True, text=True)
    want = [f"abi {abi_hash()}"]
    want += [f"nf4 {struct.unpack('<I', struct.pack('<f', v))[0]:08x}" for v in NF4]
    for name in sorted(FORMATS):
        fmt = FORMATS[name]
        scale, group = fmt.plane("scale"), fmt.group or 0
        per = {"row": -1, "tensor": -2}.get(str(scale.per), group) if scale else 0
        zero, offset = fmt.plane("zero") is not None, fmt.planes[0].encoding == "u4o8"
        f32 = scale is not None and scale.encoding == "f32"
        flags = f"{zero:d} {offset:d} {f32:d}"
        want.append(f"fmt {name} {group} {per} {flags} {max(group or 64, 32)} {cpu_packing(name)}")
    want += [f"kv {name} {fmt_name}" for name, fmt_name in K_FORMATS.items()]
    assert done.stdout.splitlines() == [*want, "id int4_g64_zp"]


def test_c_header_needs_only_numpy(tmp_path: Path) -> None:
    """CMake calls it where the runtime's other dependencies may be missing."""
    code = (
        "import sys, runpy\n"
        "for m in 'msgspec yaml tokenizers safetensors minijinja torch'.split(): sys.modules[m] = None\n"
        "sys.argv = ['c_header', sys.argv[1]]\n"
        "runpy.run_module('edge_runtime.engine.formats.c_header', run_name='__main__')\n"
    )
    out = tmp_path / "new" / "formats.h"
    run = [sys.executable, "-c", code, str(out)]
    subprocess.run(run, check=True, cwd=ROOT)
    assert out.read_text() == c_header()
    stamp = out.stat().st_mtime_ns
    subprocess.run(run, check=True, cwd=ROOT)
    assert out.stat().st_mtime_ns == stamp  # unchanged text is not written again
