"""The compressed-tensors checkpoint: schemes, writer, verification in a fresh process."""
