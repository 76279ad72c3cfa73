"""Processes, threads, and folders that several of them write."""
