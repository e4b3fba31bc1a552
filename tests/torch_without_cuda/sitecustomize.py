"""Lets torchvision be imported where its compiled library asks for CUDA and torch has none. Python runs this first.

Its Python code registers two operators that only that library declares. Nothing here computes with them.
"""

import importlib.util
from pathlib import Path

found = importlib.util.find_spec("torchvision")
if found is not None and found.origin is not None:
    import torch

    try:
        torch.ops.load_library(Path(found.origin).parent / "_C.so")
    except OSError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
