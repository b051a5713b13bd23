"""One small picture in every kind of image file: each with the pixels that it must be read as, or why it is refused."""

import base64
import io
import struct
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 4, 6
COLOUR = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
COLOUR[0, 0] = 200, 30, 40  # in linear light its grey is 117, not 82
GREY = COLOUR[:, :, 0].copy()
ALPHA = np.random.default_rng(1).integers(0, 256, (HEIGHT, WIDTH), dtype=np.uint8)
BITS = GREY >> 7
FIFTHS = COLOUR // 5  # 5 x this is what an alpha of 51 / 255 has multiplied
OTHER = Image.fromarray(255 - COLOUR)  # of a later frame or page
ROTATED = Image.Exif()
ROTATED[0x0112] = 6  # orientation: to be turned by 90 degrees, if anyone asked

# Made with imagecodecs 2026.3.6 from COLOUR or GREY: jpeg8_encode(lossless=True), jpeg8_encode(bitspersample=12),
# avif_encode(bitspersample=10), jpegxl_encode, jpeg2k_encode of int8.
LOSSLESS_GREY = """/9j/4AAQSkZJRgABAQAAAQABAAD/wwALCAAEAAYBAREA/8QAGgAAAwEAAwAAAAAAAAAAAAAABgcIBQEDBP/aAAgBAQABAABkaMa2QQyZ
2zeP+Uo1lU2Jv2SbkTZwI2yKJP/Z"""
LOSSLESS_COLOUR = """/9j/7gAOQWRvYmUAZAAAAAAA/8MAEQgABAAGA1IRAEcRAEIRAP/EABoAAAMBAQEBAAAAAAAAAAAAAAYHCAUDBAH/2gAMA1IARwBC
AAEAAGQnVPo1jYcaica2QbOEhw0bJnK2OphQM3l8wD7zOPKC4hRJuprW14FUWIhsCeTN7Ybuz0eBN6On1fI0TIdNnY1ZggMDtt7L4iwXREiJUf8A/9k="""
JPEG_12_BITS = """/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAIBAQEBAQIBAQECAgICAgQDAgICAgUEBAMEBgUGBgYFBgYGBwkIBgcJBwYGCAsICQoKCgoK
BggLDAsKDAkKCgr/wQALDAAEAAYBAREA/8QAFAABAAAAAAAAAAAAAAAAAAAAC//EACAQAAEEAQQDAAAAAAAAAAAAAAYHCAkKBQEDCwwEDRb/2gAIAQEAAD8ADr9h
18j7Yr4zPpQshncPRx675J1pp7rXMRV1W/TfVnrC1gyRRcIJMs4VXaopksJi+8BZmLuOE8UBuc2NpCxNKhkvx+c+fAEW8jVIQsXGAAfDBkW//9k="""
AVIF_10_BITS = """AAAAIGZ0eXBhdmlmAAAAAGF2aWZtaWYxbWlhZk1BMUEAAADrbWV0YQAAAAAAAAAhaGRscgAAAAAAAAAAcGljdAAAAAAAAAAAAAAAAAAA
AAAOcGl0bQAAAAAAAQAAAB5pbG9jAAAAAEQAAAEAAQAAAAEAAAETAAAASwAAAChpaW5mAAAAAAABAAAAGmluZmUCAAAAAAEAAGF2MDFDb2xvcgAAAABqaXBycAAA
AEtpcGNvAAAAFGlzcGUAAAAAAAAABgAAAAQAAAAQcGl4aQAAAAADCgoKAAAADGF2MUOBIEAAAAAAE2NvbHJuY2x4AAIAAgAGgAAAABdpcG1hAAAAAAAAAAEAAQQB
AoMEAAAAU21kYXQSAAoIOAhu3gQEDSAyPRrCYuTgABQC6AD/WuxlvNjYfBh+/OsrxnJIHvgWY8k4YLmP5kS1XaSPwKMMdB4Bcbxs7+Ea6+bsSD9nMSA="""
JPEG_XL = """/woYQBAJCAQBANwBSxiLFVJcdjdmRkRgzySMA1mWc7Okf4HAAGyBP7rKWn+v8Yu7O+Qml9kTQTSy1rfVGZ1RA5ijEBZah5G6AfHNVIoLOjrVdACp
1iORBcKFBD5Y3QK0mnZi4r5dPXbe+fwG/NbSVUnvQCfjTC5bYkfE8kYupJlUxiI="""
JPEG_2000_SIGNED = """AAAADGpQICANCocKAAAAFGZ0eXBqcDIgAAAAAGpwMiAAAAAtanAyaAAAABZpaGRyAAAABAAAAAYAAYcHAAAAAAAPY29scgEAAAAA
ABEAAACfanAyY/9P/1EAKQAAAAAABgAAAAQAAAAAAAAAAAAAAAYAAAAEAAAAAAAAAAAAAYcBAf9SAAwAAAABAAAEBAAB/1wABEBA/2QAJQABQ3JlYXRlZCBieSBP
cGVuSlBFRyB2ZXJzaW9uIDIuNS40/5AACgAAAAAALQAB/5PfgOAtOn5tzePTwlQL3bcPCXq/QWTMOAWt6Q+GmZZ//9k="""


@dataclass(frozen=True)
class Kind:
    """An image file and what it must be read as: the pixels that were stored or, if it is lossy, Pillow's."""

    data: bytes
    pixels: np.ndarray  # uint8 (H, W, 3), or (H, W) where the file is grey
    tolerance: int = 0  # levels: of the decoders of JPEG alone


def saved(image: Image.Image | np.ndarray, extension: str, **options: Any) -> bytes:
    """Encode with Pillow."""
    stream = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(stream, extension, **options)
    return stream.getvalue()


def by_pillow(data: bytes, tolerance: int = 0) -> Kind:
    with Image.open(io.BytesIO(data)) as image:
        return Kind(data, np.array(image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")), tolerance)


def png(samples: np.ndarray, colour_type: int, depth: int = 8, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of integers (H, W) or (H, W, channels), with chunks before the data."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    if depth < 8:
        bits = np.unpackbits(samples[:, :, None], axis=2)[:, :, -depth:].reshape(len(samples), -1)
        rows = [np.packbits(row).tobytes() for row in bits]
    else:
        rows = [row.astype(f">u{depth // 8}").tobytes() for row in samples]
    header = struct.pack(">IIBBBBB", samples.shape[1], samples.shape[0], depth, colour_type, 0, 0, 0)
    packed = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = [(b"IHDR", header), *chunks, (b"IDAT", packed), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def tiff(samples: np.ndarray | bytes, photometric: int, order: str = "<", **tags: int | tuple[int, ...]) -> bytes:
    """A TIFF of one strip: (H, W) or (H, W, channels), or bytes that are compressed. `tags`: "t" and a number."""
    content = samples if isinstance(samples, bytes) else samples.astype(samples.dtype.newbyteorder(order)).tobytes()
    if isinstance(samples, bytes):
        channels, bits, sample_format = 3, 8, 1
    else:
        channels, bits = samples[0, 0].size, 8 * samples.itemsize
        sample_format = {"u": 1, "i": 2, "f": 3}[samples.dtype.kind]
    values: dict[int, tuple[int, ...]] = {
        256: (WIDTH,), 257: (HEIGHT,), 258: (bits,) * channels, 259: (1,), 262: (photometric,), 273: (0,), 277: (channels,),
        278: (HEIGHT,), 279: (len(content),), 339: (sample_format,) * channels,
    }  # fmt: skip
    values |= {int(name[1:]): value if isinstance(value, tuple) else (value,) for name, value in tags.items()}
    size_of_directory = 2 + 12 * len(values) + 4
    extra, entries = b"", b""
    for tag, numbers in sorted(values.items()):
        if tag == 273:  # where the strip begins: after everything else, whose sizes are known
            numbers = (8 + size_of_directory + sum(2 * len(other) for other in values.values() if len(other) > 2),)
        packed = struct.pack(f"{order}{len(numbers)}H", *numbers)
        if len(packed) > 4:
            packed, extra = struct.pack(f"{order}I", 8 + size_of_directory + len(extra)), extra + packed
        entries += struct.pack(f"{order}HHI", tag, 3, len(numbers)) + packed.ljust(4, b"\0")
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}I", 8)
    return head + struct.pack(f"{order}H", len(values)) + entries + bytes(4) + extra + content


def pnm(magic: bytes, samples: np.ndarray, maximum: int, comment: bytes = b"") -> bytes:
    head = b"%s%s\n%d %d\n%d\n" % (magic, comment, WIDTH, HEIGHT, maximum)
    if magic in (b"P2", b"P3"):
        return head + b" ".join(b"%d" % value for value in samples.ravel().tolist()) + b"\n"
    return head + samples.astype(">u2" if maximum > 255 else "u1").tobytes()


def bmp(rows: np.ndarray, bits: int, masks: tuple[int, ...] = (), top_down: bool = False) -> bytes:
    """A BMP of rows of bytes, from the top."""
    content = (rows if top_down else rows[::-1]).tobytes()
    head = struct.pack("<3I", *masks) if masks else b""
    start, height = 54 + len(head), -HEIGHT if top_down else HEIGHT
    info = struct.pack("<IiiHHIIiiII", 40, WIDTH, height, 1, bits, 3 if masks else 0, len(content), 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", start + len(content), 0, 0, start) + info + head + content


def sixteen_bits(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return samples of 16 bits on both sides of a level and halfway to the next, and the levels that they are closest to."""
    below = np.arange(samples.size).reshape(samples.shape) % 257 - 128  # -128 to 128 of the 257 between two levels
    wide = np.clip(samples.astype(np.int64) * 257 + below, 0, 65535).astype(np.uint16)
    return wide, np.rint(wide / 257).astype(np.uint8)


def coloured_kinds() -> dict[str, Kind]:
    """Files with colour."""
    srgb, gamma = (b"sRGB", b"\0"), (b"gAMA", struct.pack(">I", 45455))
    with_alpha, image = np.dstack([COLOUR, ALPHA]), Image.fromarray(COLOUR)
    exif = (b"eXIf", ROTATED.tobytes().removeprefix(b"Exif\0\0"))
    palette = np.random.default_rng(2).integers(0, 256, (256, 3), dtype=np.uint8)
    few = image.quantize(16)
    of_few = np.array(few.convert("RGB"))
    high = COLOUR.astype(np.uint16) >> 3  # 5 bits
    words = (high[:, :, 0] << 10 | high[:, :, 1] << 5 | high[:, :, 2]).astype("<u2")
    stored = {
        "png": png(COLOUR, 2),
        "png_srgb": png(COLOUR, 2, 8, srgb),
        "png_gamma": png(COLOUR, 2, 8, gamma),
        "png_orientation": png(COLOUR, 2, 8, exif),
        "png_one_transparent_colour": png(COLOUR, 2, 8, (b"tRNS", struct.pack(">3H", 200, 30, 40))),
        "png_alpha": png(with_alpha, 6),
        "png_alpha_srgb": png(with_alpha, 6, 8, srgb),
        "png_text_that_looks_animated": png(COLOUR, 2, 8, (b"tEXt", b"Comment\0acTL")),
        "apng_first_frame_is_the_still": saved(image, "png", save_all=True, append_images=[OTHER.copy()]),
        "apng_still_of_its_own": saved(image, "png", save_all=True, append_images=[OTHER, OTHER], default_image=True),
        "jpeg_lossless": base64.b64decode(LOSSLESS_COLOUR),
        "webp": saved(image, "webp", lossless=True, exact=True),
        "webp_alpha": saved(with_alpha, "webp", lossless=True, exact=True),
        "webp_animated": saved(image, "webp", save_all=True, append_images=[OTHER.copy()], lossless=True, exact=True),
        "webp_orientation": saved(image, "webp", lossless=True, exact=True, exif=ROTATED),
        "jpeg_2000": saved(image, "jpeg2000"),
        "jpeg_2000_alpha": saved(with_alpha, "jpeg2000"),
        "jpeg_2000_codestream": saved(image, "jpeg2000", no_jp2=True),
        "bmp": saved(image, "bmp"),
        "bmp_top_down": bmp(np.pad(COLOUR[:, :, ::-1].reshape(HEIGHT, -1), ((0, 0), (0, 2))), 24, top_down=True),
        "bmp_32_bits": bmp(np.dstack([COLOUR[:, :, ::-1], 0 * ALPHA]), 32),
        "ppm": pnm(b"P6", COLOUR, 255, comment=b" # a comment\n#another"),
        "ppm_ascii": pnm(b"P3", COLOUR, 255),
        "tiff": tiff(COLOUR, 2),
        "tiff_big_endian": tiff(COLOUR, 2, ">"),
        "tiff_alpha": tiff(with_alpha, 2, t338=2),
        "tiff_fourth_channel_without_meaning": tiff(with_alpha, 2, t338=0),
        "tiff_two_pages": saved(image, "tiff", save_all=True, append_images=[OTHER.copy()]),
        "tiff_big": saved(image, "tiff", big_tiff=True),
        **{f"tiff_{name}": saved(image, "tiff", compression=name) for name in ("tiff_lzw", "tiff_deflate", "packbits")},
        **{f"tiff_orientation_{turn}": tiff(COLOUR, 2, t274=turn) for turn in range(1, 9)},
        **{
            f"tiff_lzw_orientation_{turn}": saved(image, "tiff", compression="tiff_lzw", tiffinfo={0x0112: turn})
            for turn in (3, 6)
        },
    }
    kinds = {name: Kind(data, COLOUR) for name, data in stored.items()}
    wide, scaled = sixteen_bits(COLOUR)
    ycck = bytearray(saved(image.convert("CMYK"), "jpeg"))
    ycck[ycck.index(b"Adobe") + 11] = 2  # the colours that the planes hold: now YCCK, as in some files of ImageNet
    premultiplied = tiff(np.dstack([FIFTHS, np.full_like(ALPHA, 51)]), 2, t338=1)
    indexed = png(GREY, 3, 8, (b"PLTE", palette.tobytes()), (b"tRNS", ALPHA.tobytes()))
    kinds |= {
        "png_16_bits": Kind(png(wide, 2, 16), scaled),
        "png_16_bits_srgb": Kind(png(wide, 2, 16, srgb), scaled),
        "png_16_bits_alpha": Kind(png(np.dstack([wide, ALPHA.astype(np.uint16) * 257]), 6, 16), scaled),
        "png_palette": Kind(indexed, palette[GREY]),
        "png_palette_srgb": Kind(png(GREY, 3, 8, srgb, (b"PLTE", palette.tobytes())), palette[GREY]),
        "png_palette_of_2_bits": Kind(png(GREY >> 6, 3, 2, (b"PLTE", palette[:4].tobytes())), palette[GREY >> 6]),
        "gif": Kind(saved(few, "gif"), of_few),
        "gif_transparent": Kind(saved(few, "gif", transparency=int(few.getpixel((0, 0)))), of_few),  # type: ignore[arg-type]
        "gif_animated": Kind(saved(few, "gif", save_all=True, append_images=[OTHER.quantize(16)]), of_few),
        "bmp_palette": Kind(saved(few, "bmp"), of_few),
        "bmp_16_bits": Kind(bmp(words, 16), (high * 255 // 31).astype(np.uint8)),
        "ppm_maximum_15": Kind(pnm(b"P6", COLOUR >> 4, 15), (COLOUR >> 4) * 17),
        "ppm_ascii_maximum_51": Kind(pnm(b"P3", FIFTHS, 51), FIFTHS * 5),
        "tiff_premultiplied": Kind(premultiplied, FIFTHS * 5),
        "tiff_palette": Kind(saved(few, "tiff"), of_few),
        "tiff_cmyk": by_pillow(tiff(np.dstack([255 - COLOUR, ALPHA // 4]), 5)),
    }
    lossy = {
        "jpeg": saved(image, "jpeg"),
        "jpeg_444": saved(image, "jpeg", subsampling=0),
        "jpeg_progressive": saved(image, "jpeg", progressive=True),
        "jpeg_orientation": saved(image, "jpeg", exif=ROTATED),
        "jpeg_stored_as_rgb": saved(image, "jpeg", keep_rgb=True),
        "jpeg_cmyk": saved(image.convert("CMYK"), "jpeg"),
        "jpeg_ycck": bytes(ycck),
        "jpeg_cmyk_progressive": saved(image.convert("CMYK"), "jpeg", progressive=True),
        "jpeg_several": saved(image, "mpo", save_all=True, append_images=[OTHER.copy()]),
        "webp_lossy": saved(image, "webp"),
        "webp_lossy_alpha": saved(with_alpha, "webp", exact=True),
        "avif": saved(image, "avif", quality=90),
        "avif_alpha": saved(with_alpha, "avif", quality=90),
        "avif_animated": saved(image, "avif", save_all=True, append_images=[OTHER.copy()]),
        "avif_orientation": saved(image, "avif", exif=ROTATED),
        "tiff_jpeg": saved(image, "tiff", compression="jpeg"),
    }
    return kinds | {name: by_pillow(data, 2 if name.startswith("jpeg") else 0) for name, data in lossy.items()}


def grey_kinds() -> dict[str, Kind]:
    """Files without colour."""
    image, with_alpha = Image.fromarray(GREY), np.dstack([GREY, ALPHA])
    stored = {
        "png": png(GREY, 0),
        "png_srgb": png(GREY, 0, 8, (b"sRGB", b"\0")),
        "png_alpha": png(with_alpha, 4),
        "png_alpha_gamma": png(with_alpha, 4, 8, (b"gAMA", struct.pack(">I", 45455))),
        "png_one_transparent_level": png(GREY, 0, 8, (b"tRNS", struct.pack(">H", int(GREY[0, 0])))),
        "jpeg_lossless": base64.b64decode(LOSSLESS_GREY),
        "jpeg_2000": saved(image, "jpeg2000"),
        "bmp": saved(image, "bmp"),
        "pgm": pnm(b"P5", GREY, 255),
        "tiff": tiff(GREY, 1),
        "tiff_big_endian": tiff(GREY, 1, ">"),
        "tiff_white_is_zero": tiff(255 - GREY, 0),
        "tiff_alpha": tiff(with_alpha, 1, t338=2),
        "tiff_orientation": tiff(GREY, 1, t274=6),
        "tiff_lzw": saved(image, "tiff", compression="tiff_lzw"),
    }
    kinds = {name: Kind(data, GREY) for name, data in stored.items()}
    wide, scaled = sixteen_bits(GREY)
    black_and_white = Image.fromarray(GREY > 127)
    of_one_bit = {
        "png_1_bit": png(BITS, 0, 1),
        "bmp_1_bit": saved(black_and_white, "bmp"),
        "pbm": saved(black_and_white, "ppm"),
        "pgm_maximum_1": pnm(b"P5", BITS, 1),
        "tiff_1_bit": saved(black_and_white, "tiff"),
        "tiff_group_4": saved(black_and_white, "tiff", compression="group4"),
    }
    kinds |= {name: Kind(data, BITS * 255) for name, data in of_one_bit.items()}
    kinds |= {
        "png_16_bits": Kind(png(wide, 0, 16), scaled),
        "png_16_bits_gamma": Kind(png(wide, 0, 16, (b"gAMA", struct.pack(">I", 45455))), scaled),
        "png_16_bits_alpha": Kind(png(np.dstack([wide, wide]), 4, 16), scaled),
        "jpeg_progressive": by_pillow(saved(image, "jpeg", progressive=True), 2),
        "png_2_bits": Kind(png(GREY >> 6, 0, 2), (GREY >> 6) * 85),
        "png_4_bits": Kind(png(GREY >> 4, 0, 4), (GREY >> 4) * 17),
        "pgm_maximum_51": Kind(pnm(b"P5", GREY // 5, 51), GREY // 5 * 5),
        "pgm_ascii_maximum_15": Kind(pnm(b"P2", GREY >> 4, 15), (GREY >> 4) * 17),
        "jpeg": by_pillow(saved(image, "jpeg"), 2),
        "jpeg_orientation": by_pillow(saved(image, "jpeg", exif=ROTATED), 2),
        "avif": by_pillow(saved(image, "avif", quality=90)),
    }
    return kinds


def refused_kinds() -> dict[str, tuple[bytes, str]]:
    """Files that are refused, and a part of the message."""
    deep = "16 bits per channel: convert it to 8 bits"
    animated_16 = png(COLOUR.astype(np.uint16), 2, 16, (b"acTL", struct.pack(">II", 1, 0)))
    wide, no_image = COLOUR.astype(np.uint16) * 257, "not an image that can be decoded"
    wide_grey = wide[:, :, 0].copy()
    inside = saved(Image.fromarray(COLOUR), "jpeg2000", no_jp2=True)
    return {
        "apng_16_bits": (animated_16, deep),
        "jpeg_12_bits": (base64.b64decode(JPEG_12_BITS), no_image),
        "jpeg_2000_16_bits": (saved(wide_grey, "jpeg2000"), deep),
        "jpeg_2000_signed": (base64.b64decode(JPEG_2000_SIGNED), "signed .*: convert it"),
        "avif_10_bits": (base64.b64decode(AVIF_10_BITS), "10 bits per channel: convert it"),
        "pgm_maximum_1000": (pnm(b"P5", wide_grey % 1000, 1000), "10 bits per channel: convert it"),
        "ppm_maximum_65535": (pnm(b"P6", wide, 65535), deep),
        "ppm_ascii_maximum_4095": (pnm(b"P3", wide % 4095, 4095, comment=b"\n# 7"), "12 bits per channel: convert it"),
        "pfm": (b"Pf\n6 4\n-1.0\n" + GREY.astype("<f4").tobytes(), "floating-point channels: convert it"),
        "tiff_16_bits": (tiff(wide_grey, 1), deep),
        "tiff_16_bits_big_endian": (tiff(wide_grey, 1, ">"), deep),
        "tiff_16_bits_colour": (tiff(wide, 2), deep),
        "tiff_32_bits": (tiff(wide_grey.astype(np.uint32), 1), "32 bits per channel: convert it"),
        "tiff_signed_8_bits": (tiff(GREY.view(np.int8), 1), "signed .*: convert it"),
        "tiff_signed_16_bits": (tiff(wide_grey.view(np.int16), 1), "signed .*: convert it"),
        "tiff_signed_16_bits_big_endian": (tiff(wide_grey.view(np.int16), 1, ">"), "signed .*: convert it"),
        "tiff_signed_16_bits_colour": (tiff(wide.view(np.int16), 2), no_image),
        "tiff_floating_point": (tiff(GREY.astype(np.float32), 1), "floating-point channels: convert it"),
        "tiff_floating_point_colour": (tiff(COLOUR.astype(np.float32), 2), no_image),
        "tiff_lab": (tiff(COLOUR, 8), "pixels of the kind LAB: convert it to RGB"),
        "tiff_jpeg_2000_inside": (tiff(inside, 2, t259=34712), no_image),
        "tiff_jpeg_xl_inside": (tiff(base64.b64decode(JPEG_XL), 2, t259=50002), no_image),
        "jpeg_xl": (base64.b64decode(JPEG_XL), no_image),
        "heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64), no_image),
        "text": (b"no image", no_image),
        "empty": (b"", "it is empty"),
        **{f"cut_{name}": (_cut(name), no_image) for name in ("png", "jpeg", "webp", "avif", "tiff", "bmp", "ppm")},
    }


def _cut(extension: str) -> bytes:
    data = saved(Image.fromarray(np.random.default_rng(3).integers(0, 256, (40, 40, 3), dtype=np.uint8)), extension)
    return data[: len(data) // 2]
