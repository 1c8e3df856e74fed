"""The paper's comparisons, one file each: its rows, what it asks of the results, what it plots."""
