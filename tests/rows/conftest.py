"""The tiny student on disk, which the tests of the command line have too."""

from tests.cli.conftest import student_path

__all__ = ["student_path"]
