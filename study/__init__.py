"""What makes this repository's own results: studies, claims, tables and figures. Not part of the library."""
