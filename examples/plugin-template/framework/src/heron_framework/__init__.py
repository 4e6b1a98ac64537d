"""A made-up framework: layers that are no ``torch.nn`` layers, and an engine with its own names.

It stands for the framework that your plugin is about, and knows nothing of Bittern.
"""
