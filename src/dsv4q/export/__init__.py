"""Story: an artifact in the layout of another engine."""

from dsv4q.export.job import Export
from dsv4q.export.story import export

__all__ = ["Export", "export"]
