"""The tables that pages are filled with, each of one kind."""
