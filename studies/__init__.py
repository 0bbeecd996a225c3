"""Studies beside the package: what compares its results. Nothing here is installed."""
