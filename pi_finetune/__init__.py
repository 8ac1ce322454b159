"""Position-invariant fine-tuning of speech enhancement with self-supervised representations."""

__version__ = "0.1.0"
