"""Searches for many answers: each returns what has a front, for any preference over the tasks."""
