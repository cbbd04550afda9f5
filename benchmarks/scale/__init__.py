"""A plan in bytes: LoRA steps of large models, compiled for accelerators that are not there."""
