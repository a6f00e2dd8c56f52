"""Means and deviations of ImageNet's colours, in [0, 255]."""

constants = {
    "imagenet_rgb256_mean": [123.675, 116.28, 103.53],
    "imagenet_rgb256_std": [58.395, 57.12, 57.375],
    "imagenet_bgr256_mean": [103.53, 116.28, 123.675],
    # The deviation is part of the first convolution in the weights of MSRA.
    "imagenet_bgr256_std": [1.0, 1.0, 1.0],
}
