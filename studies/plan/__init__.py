"""A study's runs: which they are, which are done, and what runs the rest."""
