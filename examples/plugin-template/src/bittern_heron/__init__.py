"""Quantizes models of heron-framework with Bittern."""
