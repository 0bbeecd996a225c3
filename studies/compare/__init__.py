"""Records of several runs held against each other: tables, figures, generated pages."""
