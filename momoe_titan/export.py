"""Write a checkpoint as a Hugging Face folder: `python -m momoe_titan.export --help`."""

from momoe_titan.inference.export import command

if __name__ == "__main__":
    command()
