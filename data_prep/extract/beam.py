"""Makes a data set from photographs on many machines: the same as data_prep.extract, as an Apache Beam pipeline.

    python -m data_prep.extract.beam FLAGS OF data_prep.extract --runner=DirectRunner|FlinkRunner|... BEAM'S FLAGS

Each worker loads the models once and writes blocks; this process then writes the data set from them. Photographs,
models and --out must have the same paths on all machines (a shared or mounted file system).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions

from data_prep import command
from data_prep.extract import blocks, run
from shnet_jax.observe.files import sole_writer


class ExtractBlock(beam.DoFn):
    """Writes the file of each block that it is given and yields its name."""

    def __init__(self, work: run.Work, device: str, batch_size: int, broken: str):
        """device, batch_size, broken: see the flags of `run.add_arguments`."""
        self._settings, self._device, self._batch_size, self._broken = work.settings, device, batch_size, broken
        self._folder, self._begun = work.folder, work.begun()

    def setup(self) -> None:
        """Loads the models and lists the photographs, once a worker."""
        self._photographs = run.open_photographs(self._settings.images)
        self._extractor = run.load_extractor(self._settings, self._device)
        if self._begun is not None:
            blocks.check_models(self._folder, self._begun, self._extractor.models)

    def process(self, block: blocks.Block) -> Iterator[str]:
        """Does a block; done again, after a worker was lost, it writes the same file."""
        policy = run.on_broken(self._broken)
        blocks.extract(block, self._photographs, self._extractor, self._batch_size, policy)
        beam.metrics.Metrics.counter("extract", "photographs").inc(len(block.items))
        yield str(block.path)


@command.reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = command.parser("extract.beam", __doc__)
    parser.allow_abbrev = False  # Beam's --region is not the start of --regions
    run.add_arguments(parser)
    args, beam_flags = parser.parse_known_args(argv)
    work = run.prepare(args)
    pending = work.pending()
    print(f"extract: {len(pending)} of {len(work.blocks)} blocks of {blocks.SIZE} photographs to do", file=sys.stderr)
    if pending:
        with sole_writer(work.folder), beam.Pipeline(options=PipelineOptions(beam_flags)) as pipeline:
            _ = (
                pipeline
                | beam.Create(pending)
                | beam.Reshuffle()
                | beam.ParDo(ExtractBlock(work, args.device, args.batch_size, args.broken))
            )
    print(run.build(work, args))
    return 0


if __name__ == "__main__":
    sys.exit(main())
