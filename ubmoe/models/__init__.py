"""Models loaded, adapted and told apart."""
