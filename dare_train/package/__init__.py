"""The package format: docs/format.md in code."""
