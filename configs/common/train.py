"""What a training run is, whatever it trains."""

train = {
    "output_dir": "./output",
    "init_checkpoint": "detectron2://ImageNetPretrained/MSRA/R-50.pkl",
    "max_iter": 90000,
    "amp": {"enabled": False, "precision": "float16"},
    "ddp": {"broadcast_buffers": False, "find_unused_parameters": False, "fp16_compression": False},
    "checkpointer": {"period": 5000, "max_to_keep": 100},
    "eval_period": 5000,
    "log_period": 20,
    "device": "cuda",
    "seed": -1,
}
