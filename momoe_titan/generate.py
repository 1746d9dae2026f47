"""Text from a checkpoint or a Hugging Face folder: `python -m momoe_titan.generate --help`."""

from momoe_titan.inference.generate import command

if __name__ == "__main__":
    command()
