"""The embedded language, its model, and its tasks."""
