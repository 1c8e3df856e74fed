"""How good a classifier is: figures with their uncertainty, and a page to look at."""
