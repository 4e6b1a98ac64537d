"""How good a model is and what quantization cost it."""

from bittern.evaluation.fold import folded_weights
from bittern.evaluation.metrics import token_nll
from bittern.evaluation.precision import in_float32
from bittern.evaluation.run import logits_of, run_evaluation

__all__ = ["folded_weights", "in_float32", "logits_of", "run_evaluation", "token_nll"]
