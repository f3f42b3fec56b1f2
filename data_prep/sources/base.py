"""Joins what several tools made of the same photographs: each source gives its fields by image id.

So a set may take its regions from one file, its grid from another and its segmentation from a third, in one pass.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from data_prep import schema
from data_prep.schema import DataError, Record


class Absent(DataError):
    """A source has nothing for an image."""


class Source(Protocol):
    """Fields of an image.

    files: field -> file or folder it comes from, for error messages.
    metadata: what the data set should know of it, such as `class_names`.
    """

    @property
    def files(self) -> Mapping[str, str]: ...  # noqa: D102

    @property
    def metadata(self) -> Mapping[str, Any]: ...  # noqa: D102

    def read(self, image_id: str) -> Record:
        """Its fields. Raises Absent when there is no such image, DataError naming the file when it is damaged."""


@dataclass(frozen=True)
class Joined:
    """Records with the fields of each source added.

    skip_absent: leave out an image that a source does not have, and say so at the end; else that is an error.
    """

    records: Iterable[Record]
    sources: Sequence[Source]
    split: str
    feature_dtype: str | None
    skip_absent: bool = False

    def __iter__(self) -> Iterator[Record]:
        absent = []
        for row, record in enumerate(self.records):
            where = f"split {self.split!r} row {row} (image {record['image_id']!r})"
            try:
                yield self._add(record, where)
            except Absent as error:
                if not self.skip_absent:
                    raise Absent(f"{where}, {error}; --absent=skip leaves such images out") from error
                absent.append(record["image_id"])
        if absent:
            shown = ", ".join(absent[:5]) + (", ..." if len(absent) > 5 else "")
            print(f"split {self.split!r}: left out {len(absent)} images that a source lacks: {shown}", file=sys.stderr)

    def _add(self, record: Record, where: str) -> Record:
        out = dict(record)
        for source in self.sources:
            for name, value in source.read(record["image_id"]).items():
                place = f"{where}, {source.files[name]}"
                if name in out:
                    raise DataError(f"{place}: field {name!r}: expected it from one source, found it in two")
                out[name] = schema.as_field(name, value, where=place, dtype=self.feature_dtype)
        return out
