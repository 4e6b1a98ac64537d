"""Core's own rules and recipes."""
