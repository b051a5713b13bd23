#!/usr/bin/env bash
# opencv-python-headless 5.0.0.93: IMREAD_GRAYSCALE of a colour PNG gives other values if the file has an sRGB or gAMA chunk.
#
# With such a chunk grey is computed in linear light, without one from the values as they are stored. IMREAD_COLOR gives the
# same pixels for all of these files, so grey that is computed from them afterwards does not depend on the chunk. Compared
# with Pillow 13.0.0, whose "L" never looks at it; numpy 2.4.6, Python 3.11.
#
# Output seen (red, green, blue of the picture are 200, 30, 40):
#
#   no chunk  IMREAD_GRAYSCALE 81   IMREAD_COLOR, then grey 82   Pillow 82
#   sRGB      IMREAD_GRAYSCALE 117  IMREAD_COLOR, then grey 82   Pillow 82
#   gAMA      IMREAD_GRAYSCALE 117  IMREAD_COLOR, then grey 82   Pillow 82
#
# Why it matters here: editors add these chunks and tools that shrink files remove them, so the same photographs, saved
# twice, would be two distributions to a network that takes grey images. datasets/decode.py therefore decodes in colour and
# computes grey itself.
#
# Exit code 0 if this is still so, 1 if it has changed.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    opencv-python-headless==5.0.0.93 pillow==13.0.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import io
import struct

import cv2
import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo


def png(name: str, content: bytes) -> bytes:
    chunks, stream = PngInfo(), io.BytesIO()
    if name != "no chunk":
        chunks.add(name.encode(), content)
    Image.new("RGB", (16, 16), (200, 30, 40)).save(stream, "png", pnginfo=chunks)
    return stream.getvalue()


found = {}
for name, content in (("no chunk", b""), ("sRGB", b"\0"), ("gAMA", struct.pack(">I", 45455))):
    data = png(name, content)
    assert name == "no chunk" or name.encode() in data
    file = np.frombuffer(data, np.uint8)
    in_colour = cv2.cvtColor(cv2.imdecode(file, cv2.IMREAD_COLOR), cv2.COLOR_BGR2GRAY)
    found[name] = {
        "IMREAD_GRAYSCALE": int(cv2.imdecode(file, cv2.IMREAD_GRAYSCALE)[8, 8]),
        "IMREAD_COLOR, then grey": int(in_colour[8, 8]),
        "Pillow": Image.open(io.BytesIO(data)).convert("L").getpixel((8, 8)),
    }
    print(f"{name:<9}", "  ".join(f"{way} {value:<3}" for way, value in found[name].items()))

steady = {values[way] for values in found.values() for way in ("IMREAD_COLOR, then grey", "Pillow")}
directly = [values["IMREAD_GRAYSCALE"] for values in found.values()]
if steady != {82} or directly[0] > 83 or min(directly[1:]) < 100:
    raise SystemExit("this has changed: look at datasets/decode.py again")
PYTHON
