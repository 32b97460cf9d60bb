"""`python -m eval.quality_table`: a backbone's quality as a table."""
