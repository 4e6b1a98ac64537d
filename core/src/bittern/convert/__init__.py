"""From a plan to a quantized model, and back."""

from bittern.convert.apply import convert, plan_of, remember, revert

__all__ = ["convert", "plan_of", "remember", "revert"]
