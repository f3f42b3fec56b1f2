"""Joins what several tools made of the same photographs: each source gives its fields by image id.

So a set may take its regions from one file, its grid from another and its segmentation from a third, in one pass.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from data_prep import schema
from data_prep.bad_records import Bad
from data_prep.names import Absent, Ambiguous
from data_prep.schema import DataError, Record


class Source(Protocol):
    """Fields of an image."""

    @property
    def files(self) -> Mapping[str, str]:
        """Files or folders that each field comes from, for error messages."""

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Metadata of the data set that the files hold, such as `class_names`; most have none."""
        return {}

    def read(self, image_id: str) -> Record:
        """Fields of an image; `names.Names` decides which entry is the image's.

        Raises Absent when there is no such image, Ambiguous when it is not clear which is, DataError naming the file
        when it is damaged.
        """


@runtime_checkable
class CaptionSource(Source, Protocol):
    """A source that has fields of the captions too."""

    def read_captions(self, record: Record) -> Record:
        """Caption fields in the order of `record["captions"]`; raises as `read`, DataError for other captions."""


@dataclass(frozen=True)
class Joined:
    """Records with the fields of each source added, and a Bad where a source is damaged.

    skip_absent: leave out an image that a source does not have, and say so at the end; else that is an error.
    """

    records: Iterable[Record | Bad]
    sources: Sequence[Source]
    split: str
    feature_dtype: str | None
    skip_absent: bool = False

    def __iter__(self) -> Iterator[Record | Bad]:
        absent = []
        for row, record in enumerate(self.records):
            item = record if isinstance(record, Bad) else self._joined(record, row)
            if isinstance(item, Bad) and item.asked:
                absent.append(item.image_id)
            yield item
        if absent:
            shown = ", ".join(absent[:5]) + (", ..." if len(absent) > 5 else "")
            print(f"split {self.split!r}: left out {len(absent)} images that a source lacks: {shown}", file=sys.stderr)

    def _joined(self, record: Record, row: int) -> Record | Bad:
        image_id = record["image_id"]
        where = f"split {self.split!r} row {row} (image {image_id!r})"
        try:
            return self._add(record, where)
        except Absent as error:
            if not self.skip_absent:
                raise Absent(f"{where}, {error}; --absent=skip leaves such images out") from error
            return Bad(image_id, error, asked=True)
        except Ambiguous as error:  # not of this record alone: another may have been written with what is not its own
            raise Ambiguous(f"{where}, {error}") from error
        except DataError as error:
            return Bad(image_id, error)

    def _add(self, record: Record, where: str) -> Record:
        out = dict(record)
        for source in self.sources:
            for name, value in _read(source, record, where).items():
                file = source.files[name]
                if name in out:
                    message = f"{where}, {file}: field {name!r}: expected it from one source, found it in two"
                    raise DataError(message, file=file, field=name)
                if name in ("regions", "grid") and np.size(value) and not np.any(value):
                    message = f"{where}, {file}: field {name!r}: expected features, found zeros alone (never written?)"
                    raise DataError(message, file=file, field=name)
                out[name] = schema.as_field(name, value, where=where, file=file, dtype=self.feature_dtype)
        return out


def _read(source: Source, record: Record, where: str) -> Record:
    """Fields that the source has for a record; error messages begin with the place of the record."""
    try:
        fields = source.read(record["image_id"])
        return fields | source.read_captions(record) if isinstance(source, CaptionSource) else fields
    except (Absent, Ambiguous):
        raise
    except DataError as error:
        file = error.file or ", ".join(dict.fromkeys(source.files.values()))
        raise DataError(f"{where}, {error}", file=file, field=error.field) from error
    except OSError as error:  # a link to nothing, no permission, a folder in place of the file
        file = str(error.filename or ", ".join(dict.fromkeys(source.files.values())))
        raise DataError(f"{where}, {file}: cannot be read: {error.strerror or error}", file=file) from error
