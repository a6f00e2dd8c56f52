r"""Convert weights between Detectron2, torchvision, MMDetection and d2kit.

d2kit convert-weights model_final.pkl mask_rcnn.pth --to torchvision
d2kit convert-weights mmdet.pth mask_rcnn.safetensors    # d2kit's names, which are Detectron2's
d2kit convert-weights run/model_final.pth served --to d2kit-folder --config-file run/config.yaml

The source is a file, a URL, or a name such as torchvision://maskrcnn_resnet50_fpn; whose names it
has is recognised. The suffix of the target decides its format: .pth, .safetensors or .pkl.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from d2kit import __version__
from d2kit.checkpoint import DetectionCheckpointer
from d2kit.checkpoint.c2_model_loading import LIBRARIES, convert_file
from d2kit.checkpoint.catalog import find_weights
from d2kit.cli.export import build_metadata_of
from d2kit.config import CfgNode, get_cfg
from d2kit.engine import user_errors
from d2kit.export.backends import FILES, METADATA, sha256
from d2kit.modeling import build_model
from d2kit.utils.file_io import atomic_write


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        prog="d2kit convert-weights",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source")
    parser.add_argument("target", type=Path)
    parser.add_argument("--to", choices=(*LIBRARIES, "d2kit-folder"), default="d2kit")
    parser.add_argument("--config-file", help="of d2kit-folder: the config of the training")
    return parser.parse_args(argv)


@user_errors()
def main(argv: list[str] | None = None) -> None:
    """Convert one file."""
    args = parse(argv)
    if args.to == "d2kit-folder":
        if args.config_file is None:
            raise ValueError("--to d2kit-folder needs --config-file, the config of the training")
        print(write_folder(Path(args.config_file), args.source, args.target))
        return
    print(convert_file(find_weights(args.source), args.target, args.to))


def write_folder(config: Path, weights: str, target: Path) -> str:
    """Write config, weights and metadata of a model that was trained elsewhere into one folder.

    Args:
        config: ``config.yaml`` of the training, also one that Detectron2 dumped.
        weights: file, URL or zoo name; Detectron2's, torchvision's and MMDetection's are read.
        target: folder to write: ``config.yaml``, ``model_final.pth``, ``metadata.json``.

    Returns:
        A sentence on what was done.

    Raises:
        FileNotFoundError: if config or weights cannot be found.
        ValueError: if weights are missing or of another shape than the config's model, or pixel
            statistics and channels do not fit each other.
    """
    if not config.is_file():
        raise FileNotFoundError(f"{config}: no such config")
    cfg = get_cfg()
    cfg.merge_from_file(str(config))
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", weights])
    _check_pixels(cfg)
    model = build_model(cfg).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.fill_(float("nan"))  # what the file does not fill stays so
    DetectionCheckpointer(model).load(weights)
    state = model.state_dict()
    unfilled = [n for n, v in state.items() if v.is_floating_point() and bool(v.isnan().all())]
    unfilled = [n for n in unfilled if state[n].numel() and "cell_anchors" not in n]
    if unfilled:
        raise ValueError(
            f"{weights} lacks {len(unfilled)} weights of the model of {config}, or has them in "
            f"another shape, e.g. {', '.join(unfilled[:3])}: is it the config of this training?"
        )
    for name, value in state.items():
        if "cell_anchors" in name:
            value.copy_(before[name])
    target.mkdir(parents=True, exist_ok=True)
    file = target / FILES["d2kit"]
    with atomic_write(file) as stream:
        torch.save({"model": state, "__author__": "d2kit"}, stream)
    cfg.merge_from_list(["MODEL.WEIGHTS", str(file.resolve())])
    metadata = {
        **build_metadata_of(cfg),
        "format": "d2kit",
        "d2kit": __version__,
        "stride_in_1x1": cfg.MODEL.RESNETS.STRIDE_IN_1X1,
        "sha256": {file.name: sha256(file)},
    }
    with atomic_write(target / "config.yaml", "w") as stream:
        stream.write(cfg.dump())
    with atomic_write(target / METADATA, "w") as stream:
        json.dump(metadata, stream, indent=1)
    return f"{target}: config.yaml, {file.name} with {len(state)} weights, {METADATA}"


def _check_pixels(cfg: CfgNode) -> None:
    """Refuse pixel statistics that contradict the channel order or each other."""
    mean, std = list(cfg.MODEL.PIXEL_MEAN), list(cfg.MODEL.PIXEL_STD)
    order = cfg.INPUT.FORMAT
    if order not in ("BGR", "RGB") or len(mean) != 3 or len(std) != 3:
        raise ValueError(
            f"INPUT.FORMAT '{order}' with {len(mean)} values in MODEL.PIXEL_MEAN and {len(std)} in "
            "MODEL.PIXEL_STD: expected BGR or RGB and three values each"
        )
    if min(std) <= 0:
        raise ValueError(f"MODEL.PIXEL_STD: expected positive values, got {std}")
    # ImageNet's mean is 123.7 for red and 103.5 for blue: the wrong order costs some AP silently
    blue, red = (mean[0], mean[2]) if order == "BGR" else (mean[2], mean[0])
    if abs(blue - 123.675) < 1 and abs(red - 103.53) < 1:
        raise ValueError(
            f"MODEL.PIXEL_MEAN {mean} is ImageNet's in the other order than INPUT.FORMAT {order}"
        )
