"""From a command line to a trained model."""

from trainer.launch import run

__all__ = ["run"]
