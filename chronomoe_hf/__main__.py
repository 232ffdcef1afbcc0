"""``python -m chronomoe_hf``: the ``chronomoe`` command."""

from chronomoe_hf.cli.main import main

if __name__ == "__main__":
    main()
