"""RegNets of 4 billion multiply-adds, found in "Designing network design spaces".

Source: Radosavovic et al. 2020 (arXiv 2003.13678).
"""

from d2kit.config import LazyCall as L
from d2kit.modeling.backbone import RegNet
from d2kit.modeling.backbone.regnet import ResBottleneckBlock, SimpleStem

STAGES = ["s1", "s2", "s3", "s4"]

regnetx_4gf = L(RegNet)(
    stem_class=SimpleStem,
    stem_width=32,
    block_class=ResBottleneckBlock,
    depth=23,
    w_a=38.65,
    w_0=96,
    w_m=2.43,
    group_width=40,
    norm="BN",
    out_features=STAGES,
)
regnety_4gf = L(RegNet)(
    stem_class=SimpleStem,
    stem_width=32,
    block_class=ResBottleneckBlock,
    depth=22,
    w_a=31.41,
    w_0=96,
    w_m=2.24,
    group_width=64,
    se_ratio=0.25,
    norm="BN",
    out_features=STAGES,
)
pixel_std = [57.375, 57.12, 58.395]  # in the order BGR, as the means
