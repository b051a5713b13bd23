#!/usr/bin/env bash
# PNG files and zlib's crc32: the CRC-32 of whole PNG files that differ in their pixels alone has 65,536 values, not 2**32.
#
# Every chunk of a PNG ends with the CRC-32 of its own bytes. A CRC-32 that goes on over data and their own CRC-32 would end at
# a constant, whatever the data were; PNG stores it with the highest byte first, which leaves 16 of its 32 bits. So two files
# of the same size have the same CRC-32 once in 65,536 pairs. It still notices changed bytes, as long as the CRC-32 that the
# chunk has in it is not changed with them. Pillow 13.0.0 wrote the files, numpy 2.4.6 drew the pixels, Python 3.11 zlib.
#
# Output seen for 20,000 pictures of 8x8 random pixels, all stored in files of one size:
#
#   sizes of files          1
#   different files         20000
#   different CRC-32s       17272 (expected of 2**16 values: 17236; of 2**32: 20000)
#   of their pixels alone   20000
#
# Why it matters here: the index of a data set has size and CRC-32 of every image. They find damage, but do not say whether
# two images are the same: datasets/overlap.py compares bytes.
#
# Exit code 0 if this is still so, 1 if it has changed.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check pillow==13.0.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import io
import zlib

import numpy as np
from PIL import Image

COUNT = 20_000
draw, files, pixels = np.random.default_rng(0), [], []
for _ in range(COUNT):
    values = draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "png", compress_level=0)
    files.append(stream.getvalue())
    pixels.append(values.tobytes())

sizes, different = {len(file) for file in files}, len(set(files))
of_files, of_pixels = (len({zlib.crc32(data) for data in some}) for some in (files, pixels))
expected = round(2**16 * (1 - (1 - 2**-16) ** COUNT))
print(f"sizes of files          {len(sizes)}")
print(f"different files         {different}")
print(f"different CRC-32s       {of_files} (expected of 2**16 values: {expected}; of 2**32: {COUNT})")
print(f"of their pixels alone   {of_pixels}")
if not (len(sizes) == 1 and different == COUNT and abs(of_files - expected) < 200 and of_pixels > COUNT - 5):
    raise SystemExit("this has changed: look at datasets/overlap.py again")
PYTHON
