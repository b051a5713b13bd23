#!/usr/bin/env bash
# opencv-python-headless 5.0.0.93: IMREAD_COLOR_RGB swaps red and blue of an AVIF image with transparency.
#
# The same image without transparency is read right, and so are both with IMREAD_COLOR, which means BGR. Compared with
# Pillow 13.0.0, which wrote the files; numpy 2.4.6, Python 3.11.
#
# Output seen (red, green, blue of an orange picture):
#
#   opaque       Pillow [255, 128, 0]  IMREAD_COLOR_RGB [255, 128, 0]  IMREAD_COLOR, reversed [255, 128, 0]
#   transparent  Pillow [255, 128, 0]  IMREAD_COLOR_RGB [0, 128, 255]  IMREAD_COLOR, reversed [255, 128, 0]
#
# Why it matters here: a network that was trained on PNG files gets blue for red where the same pictures come as AVIF with
# transparency, and no file is damaged. datasets/rare_formats.py therefore reads AVIF with Pillow.
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

import cv2
import numpy as np
from PIL import Image

orange, found = (255, 128, 0), {}
for name, mode, colour in (("opaque", "RGB", orange), ("transparent", "RGBA", (*orange, 128))):
    stream = io.BytesIO()
    Image.new(mode, (32, 32), colour).save(stream, "avif", quality=90)
    file = np.frombuffer(stream.getvalue(), np.uint8)
    ways = {
        "Pillow": np.array(Image.open(stream).convert("RGB")),
        "IMREAD_COLOR_RGB": cv2.imdecode(file, cv2.IMREAD_COLOR_RGB),
        "IMREAD_COLOR, reversed": cv2.imdecode(file, cv2.IMREAD_COLOR)[:, :, ::-1],
    }
    found[name] = {way: pixels[16, 16].tolist() for way, pixels in ways.items()}
    print(f"{name:<12}", "  ".join(f"{way} {pixel}" for way, pixel in found[name].items()))

opaque, transparent = found.values()
as_expected = len({str(pixel) for pixel in opaque.values()}) == 1
swapped = transparent["IMREAD_COLOR_RGB"] == transparent["Pillow"][::-1] == transparent["IMREAD_COLOR, reversed"][::-1]
if not (as_expected and swapped):
    raise SystemExit("this has changed: look at datasets/rare_formats.py again")
PYTHON
