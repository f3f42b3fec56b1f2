"""`python -m shnet_jax` is the command `shnet`."""

from shnet_jax.cli import run

if __name__ == "__main__":
    run()
