"""Whole runs, as the command makes them: one file for each kind."""
