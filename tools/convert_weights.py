#!/usr/bin/env python3
r"""Convert weights between Detectron2, torchvision, MMDetection and d2kit.

convert_weights.py model_final.pkl mask_rcnn.pth --to torchvision
convert_weights.py mmdet.pth mask_rcnn.safetensors          # names of d2kit, which are Detectron2's
convert_weights.py run/model_final.pth served --to d2kit-folder --config-file run/config.yaml

The source is a file, a URL, or a name such as torchvision://maskrcnn_resnet50_fpn; whose names it
has is recognised. The suffix of the target decides its format: .pth, .safetensors or .pkl.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from d2kit.checkpoint.catalog import find_weights
from d2kit.checkpoint.conversion import LIBRARIES, convert_file
from d2kit.cli.model_folder import write_folder
from d2kit.engine import user_errors


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source")
    parser.add_argument("target", type=Path)
    parser.add_argument("--to", choices=(*LIBRARIES, "d2kit-folder"), default="d2kit")
    parser.add_argument("--config-file", help="of d2kit-folder: the config of the training")
    return parser.parse_args(arguments)


def main(args: argparse.Namespace) -> None:
    """Convert one file."""
    if args.to == "d2kit-folder":
        if args.config_file is None:
            raise ValueError("--to d2kit-folder needs --config-file, the config of the training")
        print(write_folder(Path(args.config_file), args.source, args.target))
        return
    print(convert_file(find_weights(args.source), args.target, args.to))


if __name__ == "__main__":
    with user_errors():
        main(parse())
