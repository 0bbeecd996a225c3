"""Models loaded, adapted and identified."""
