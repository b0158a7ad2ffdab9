"""Deletion requests: who asked, which rows, what was done, and the evidence."""
