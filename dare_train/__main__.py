"""`python -m dare_train`: the same as `dare-train`."""

from .cli.main import command

if __name__ == "__main__":
    command()
