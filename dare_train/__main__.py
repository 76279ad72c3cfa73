"""`python -m dare_train`: the same as `dare-train`."""

import sys

if __name__ == "__main__":
    if not getattr(sys.flags, "safe_path", False):
        # `-m` has the current folder first: a torch.py that lies there would be taken for torch.
        sys.path.append(sys.path.pop(0))
    from .cli.main import command

    command()
