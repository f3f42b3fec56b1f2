"""Makes a data set from photographs, with or without captions, with pretrained models.

    shnet data extract --images=DIR [--captions=FILE] --segmenter=MODEL --backbone=MODEL --name=NAME --out=DIR

Tars and Parquet files as --images bring their captions with them. Photographs without any captions are a data set that
can be searched, not trained on.
A run that was stopped goes on with the same command.

It needs: pip install -e '.[extract]'
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from data_prep import command, encode_captions
from data_prep.builder import VERSION
from data_prep.extract import blocks, run
from shnet_jax.observe.files import sole_writer


@command.reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = command.parser("extract", __doc__)
    run.add_arguments(parser)
    encode_captions.add_encoder_arguments(parser)
    args: argparse.Namespace = parser.parse_args(argv)
    work = run.prepare(args)
    encoder = encode_captions.chosen_encoder(args) if args.text_encoder else None  # before hours of photographs
    if work.built:
        path = args.out / args.name / VERSION
        print(f"extract: {path} is there; going on with its captions", file=sys.stderr)
    else:
        with sole_writer(work.folder):
            run.extract_here(work, args)
        path = run.build(work, args, keep_settings=encoder is not None)
    if encoder is not None:
        encode_captions.encode_captions(path, args.name, args.out, *encoder, dtype=args.text_dtype, overwrite=True)
        blocks.remove(work.folder)
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
