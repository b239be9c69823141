"""What is learned or chosen beforehand for a model: profiles, widths, recipes, operating points."""
