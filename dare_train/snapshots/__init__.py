"""Packages while a model trains."""
