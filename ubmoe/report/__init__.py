"""Results as text and pictures, without torch."""
