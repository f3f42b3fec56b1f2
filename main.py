"""The command line from a checkout: `python main.py --mode=train FLAGS` is `shnet train FLAGS`."""

from shnet_jax.cli import run

if __name__ == "__main__":
    run()
