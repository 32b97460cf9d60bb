"""Offline distillation: the few-step diffuser and the decoders that undo merging and noise."""
