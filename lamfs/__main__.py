"""``python -m lamfs`` is the command ``lamfs``."""

from lamfs.cli import main

if __name__ == "__main__":
    main(prog_name="lamfs")
