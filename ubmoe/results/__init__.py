"""Records, the study's runs, and tables beside the paper's (python -m ubmoe.results)."""
