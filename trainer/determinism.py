"""`--deterministic`: the same command gives the same numbers, bit for bit."""

import os

import torch


def make_deterministic() -> None:
    """Have torch use kernels that always add in the same order; an operation that has none raises an error.

    Call it before anything has run on CUDA: cuBLAS reads its workspace setting when it starts.
    """
    import torch._inductor.config as inductor  # not with every start: it takes seconds

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    # As torch 2.8 does when it compiles: it pads matrices. 2.11 does not in this mode.
    inductor.shape_padding = False
