"""Draw capital letters in this machine's fonts: pictures of many sizes to classify, which need no download.

    python tests/glyphs.py FOLDER [--train N] [--test N]

The classes are A to Z. Fonts in the test set are not in the training set: fonts whose names begin with the same word, such
as DejaVu Sans and DejaVu Serif, are in the same one. (Copies of a design under another name may be in both, as Nimbus Sans
and Liberation Sans.) The same fonts and options give the same pictures.

Debian's packages of fonts that --packages prints have more than 100 such names:

    python tests/glyphs.py --packages | xargs apt-get install --no-install-recommends
"""

import argparse
import io
import itertools
import string
import sys
from functools import cache
from pathlib import Path

import cv2
import numpy as np
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

LETTERS = string.ascii_uppercase
MIN_GROUPS = 20
"""Fonts of fewer different names are too few to learn from."""
_OTHER_SIGNS = ("D050000L", "Standard Symbols PS")  # fonts with stars and Greek in the places of letters
_PACKAGES = """
    adf-accanthis adf-baskervald adf-berenis adf-gillius adf-ikarius adf-irianis adf-libris adf-mekanus adf-oldania
    adf-romande adf-solothurn adf-switzera adf-tribun adf-universalis adf-verana allerta anonymous-pro arapey
    averia-gwf averia-sans-gwf averia-serif-gwf b612 bebas-neue beteckna breip cabin cabinsketch cantarell cardo
    clear-sans comfortaa comic-neue courier-prime crosextra-caladea crosextra-carlito dancingscript dejavu-core
    dkg-handwriting dosis dustin ebgaramond engadget essays1743 eurofurence fanwood femkeklaver freefont-ttf
    gfs-didot gfs-neohellenic go goudybookletter hack inconsolata inter isabella jetbrains-mono junction jura karla
    kaushanscript kristi lato league-spartan leckerli-one liberation lindenhill linuxlibertine lobster lobstertwo
    manrope monofur ocr-a okolaks oldstandard open-sans paratype play prociono quattrocento quicksand roboto-slab
    roboto-unhinted rufscript sil-charis sil-gentium sora staypuft texgyre tomsontalks train tuffy urw-base35
    vollkorn yanone-kaffeesatz
"""
FONT_PACKAGES = [f"fonts-{name}" for name in _PACKAGES.split()]


@cache
def font_groups() -> dict[str, list[str]]:
    """The files of the fonts here that draw each letter differently, by the first word of their names."""
    groups: dict[str, list[str]] = {}
    for path in sorted(
        font_manager.findSystemFonts()
    ):  # not of its cache, which does not know what was installed since
        if _has_letters(path):
            groups.setdefault(FT2Font(path).family_name.split()[0], []).append(path)
    return dict(sorted(groups.items()))


def _has_letters(path: str) -> bool:
    face = FT2Font(path)
    if face.family_name in _OTHER_SIGNS or not {ord(letter) for letter in LETTERS} <= face.get_charmap().keys():
        return False
    font = ImageFont.truetype(path, 40)
    drawn = {bytes(font.getmask(letter)) for letter in LETTERS}
    return len(drawn) == len(LETTERS) and b"" not in drawn


def split_groups(groups: dict[str, list[str]]) -> dict[str, list[list[str]]]:
    """Every fourth name is for the test set."""
    files = list(groups.values())
    return {"train": [some for place, some in enumerate(files) if place % 4], "test": files[::4]}


def draw_letter(letter: str, font: str, draw: np.random.Generator) -> Image.Image:
    """Draw a letter in one of two colours, turned a little, near the centre of a picture of 64 to 256 pixels a side."""
    width, height = (int(side) for side in draw.integers(64, 257, 2))
    background, ink = _colours(draw)
    pixels = background + 24 * _waves(height, width, draw)
    picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))

    size = int(draw.uniform(0.5, 0.85) * min(width, height))
    face = ImageFont.truetype(font, 4 * size)
    left, top, right, bottom = face.getbbox(letter)
    mask = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(mask).text((-left, -top), letter, font=face, fill=255)
    scale = size / max(mask.size)
    mask = mask.resize([max(3, round(side * scale)) for side in mask.size], Image.Resampling.LANCZOS)
    mask = mask.rotate(draw.uniform(-15, 15), Image.Resampling.BICUBIC, expand=True)
    room = max(0, min(width, height) - max(mask.size)) / 2  # so that the centre square has the whole letter
    corner = [
        round((side - own) / 2 + draw.uniform(-room, room))
        for side, own in zip((width, height), mask.size, strict=True)
    ]
    picture.paste(tuple(ink.astype(int).tolist()), (corner[0], corner[1]), mask)
    return picture


def _colours(draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Two colours whose brightness is at least 60 levels apart."""
    while True:
        one, other = draw.uniform(0, 256, (2, 3))
        if abs((one - other) @ [0.299, 0.587, 0.114]) >= 60:
            return one, other


def _waves(height: int, width: int, draw: np.random.Generator) -> np.ndarray:
    """Smooth noise, about -1 to 1: (height, width, 3)."""
    coarse = draw.normal(0, 0.6, (2 + height // 40, 2 + width // 40, 3))
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def write_letters(folder: Path, train: int, test: int, quality: int = 90) -> Path:
    """Write that many JPEGs (4:2:0) of each letter to <folder>/<split>/<letter>/; returns the folder."""
    splits = split_groups(font_groups())
    for split, count in (("train", train), ("test", test)):
        for (label, letter), number in itertools.product(enumerate(LETTERS), range(count)):
            draw = np.random.default_rng((split == "test", label, number))
            fonts = splits[split][draw.integers(len(splits[split]))]
            stream = io.BytesIO()
            picture = draw_letter(letter, fonts[draw.integers(len(fonts))], draw)
            picture.save(stream, "jpeg", quality=quality, subsampling="4:2:0")
            path = folder / split / letter / f"{number:04d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(stream.getvalue())
    return folder


def main() -> None:
    """Write the set, or print the packages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--train", type=int, default=400, help="training pictures of each letter (default: 400)")
    parser.add_argument("--test", type=int, default=100, help="test pictures of each letter (default: 100)")
    parser.add_argument("--packages", action="store_true", help="print Debian's packages of fonts instead")
    args = parser.parse_args()
    if args.packages:
        print(*FONT_PACKAGES)
        return
    if args.folder is None:
        parser.error("give the folder to write to")
    groups = font_groups()
    if len(groups) < MIN_GROUPS:
        sys.exit(f"fonts of {len(groups)} names here, at least {MIN_GROUPS} are needed; `--packages` names some")
    write_letters(args.folder, args.train, args.test)
    counts = [f"{len(some)} names of fonts for {split}" for split, some in split_groups(groups).items()]
    print(f"{args.folder}: {len(LETTERS)} classes, {args.train} + {args.test} pictures each; {', '.join(counts)}")


if __name__ == "__main__":
    main()
