"""`python -m lightning_distopt`, the same as `lightning-distopt`."""

from lightning_distopt.cli import main

if __name__ == "__main__":
    main()
