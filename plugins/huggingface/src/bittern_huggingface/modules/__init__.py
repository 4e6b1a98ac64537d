"""Quantized classes of the layers that only transformers has, and the rules that take them."""
