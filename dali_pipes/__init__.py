from dali_pipes.eval_loader import EvalBatch, EvalLoader
from dali_pipes.index import DatasetError, DatasetIndex
from dali_pipes.loader import Batch, ViewLoader
from dali_pipes.sampling import SampleParams, sample_params
from dali_pipes.views import IMAGENET_MEAN, IMAGENET_STD, MOCO_V2, MOCO_V3, SIMCLR, Recipe, ViewSpec, multi_crop

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "MOCO_V2",
    "MOCO_V3",
    "SIMCLR",
    "Batch",
    "DatasetError",
    "DatasetIndex",
    "EvalBatch",
    "EvalLoader",
    "Recipe",
    "SampleParams",
    "ViewLoader",
    "ViewSpec",
    "multi_crop",
    "sample_params",
]
