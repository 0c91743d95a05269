"""The claims of the DARE paper (arXiv 2311.03099), reproduced on small models trained here."""
