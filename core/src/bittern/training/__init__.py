"""Training a quantized model: what its ranges do meanwhile, and a teacher to learn from."""

from bittern.training.distillation import Distillation
from bittern.training.ranges import RangeTraining, train_ranges

__all__ = ["Distillation", "RangeTraining", "train_ranges"]
