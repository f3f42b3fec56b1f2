"""Importers as a user runs them, on the two photographs of `example.FILES`."""

import pytest

from tests.data_prep.example import FILES, stored_records


@pytest.fixture
def run(tmp_path, capsys):
    """run(main, *flags) imports the features that the flags name; -> the records of val or None, and what is printed.

    A flag that is given here may be given again: the last one counts.
    """
    lines = [f"{file},a caption {n},val" for file in FILES for n in range(3)]
    (tmp_path / "captions.csv").write_text("\n".join(["image,caption,split", *lines]) + "\n")

    def run(main, *flags):
        given = [f"--captions={tmp_path / 'captions.csv'}", "--name=toy", f"--out={tmp_path / 'out'}", "--overwrite"]
        failed = main([*given, *flags])
        printed = capsys.readouterr().err
        return None if failed else stored_records(tmp_path / "out"), printed

    return run
