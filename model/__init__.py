"""The learning side: backbones, heads, MoCo v3, LARS, schedules. Knows nothing of data."""

from model.contrastive import contrastive_loss
from model.lars import LARS
from model.moco import MoCoV3
from model.schedules import learning_rate, momentum_coefficient
from model.sync_bn import SyncBatchNorm

__all__ = ["LARS", "MoCoV3", "SyncBatchNorm", "contrastive_loss", "learning_rate", "momentum_coefficient"]
