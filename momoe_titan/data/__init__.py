"""Text to train on: corpora, the loader that shares them out to ranks, and the tokenizer.

Importing this package adds its datasets to those that TorchTitan knows by name (see `registration`).
"""

from momoe_titan.data.registration import register_datasets

register_datasets()
