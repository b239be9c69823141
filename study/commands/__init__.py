"""Commands of the study, one a file."""
