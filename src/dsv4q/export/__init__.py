"""Story: an artifact in the layout of another engine."""
