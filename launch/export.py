"""Export a run's model, load it again, and compare it with the original on real images.

    shardstep export RUN_DIR_OR_CHECKPOINT --format safetensors|torch_export|onnx [--pixels uint8|float32] [--out FILE]
                     [--data DIR]

The model takes pixels (batch, channels, height, width), 0 to 255, and normalises them; the file's metadata describe its use,
under the key `shardstep`. It is written only if the largest difference of any output is within a tolerance, which is printed;
else the exit code is 1. onnx needs the extra `export`.
"""

import argparse
import sys
from pathlib import Path

from shardstep.configs.errors import InputError
from shardstep.configs.files import check_output_file
from shardstep.configs.text import count, printable
from shardstep.launch.cli import FAILED, run_script
from shardstep.launch.trust import add_trust_option, trust_if_asked


def main(arguments: list[str]) -> int:
    """Export; return the exit code."""
    parser = argparse.ArgumentParser(prog="shardstep export", description="Export a run's model for use elsewhere.")
    parser.add_argument("run", type=Path, help="a run's folder, or one of its checkpoints")
    parser.add_argument("--format", choices=["safetensors", "torch_export", "onnx"], required=True)
    pixels = "type of the pixels that the model takes; ncnn and Core ML need float32 (default: uint8)"
    parser.add_argument("--pixels", choices=["uint8", "float32"], default="uint8", help=pixels)
    parser.add_argument("--out", type=Path, help="the file (default: exported.<suffix>, in the run's folder)")
    parser.add_argument("--data", help="shards of images to compare on (default: the run's test set)")
    add_trust_option(parser)
    args = parser.parse_args(arguments)

    from shardstep.trainer.analysis.export_formats import FORMATS, ExportFailed, export
    from shardstep.trainer.analysis.trained_model import open_trained_model, unfinished_note
    from shardstep.trainer.data import other_mode_note

    suffix = FORMATS[args.format].suffix
    trust_if_asked(args)
    trained = open_trained_model(args.run, "cpu")
    for note in (unfinished_note(args.run, trained.weights), trained.crop_note):
        if note:
            print(printable(note))
    out = args.out or trained.run_dir.path / f"exported{suffix}"
    if out.suffix != suffix:
        raise InputError(f"--out={out} must end in {suffix} for --format={args.format}")
    check_output_file("--out", out)
    if out.resolve() == trained.weights:
        raise InputError(f"--out={out} would overwrite the weights of the run: give another name")
    try:
        test, reader = trained.open_test_set(args.data)
    except InputError as error:
        remedy = "another --data" if args.data else "--data"
        missing = "there are no images to compare the exported model on, so it is not written"
        raise InputError(f"{missing}: {error}. Give {remedy}") from None
    if note := other_mode_note(trained.manifest, "test", test.manifest):
        print(note)
    try:
        found = export(trained, args.format, out, reader, test.all_ids(), args.pixels)
    except ExportFailed as error:
        print(f"failed: {error}", file=sys.stderr)
        return FAILED
    print(
        f"{out}: {out.stat().st_size / 1e6:.2f} MB, checked with {FORMATS[args.format].checked_with}: loaded again, its "
        f"outputs differ from the original's by at most {found.largest:.2g} on {count(found.images, 'image')} of "
        f"{args.data or trained.test_set_name} ({found.allowed:.2g} is allowed)"
    )
    return 0


if __name__ == "__main__":
    run_script(main)
