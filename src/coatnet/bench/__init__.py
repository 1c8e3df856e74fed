"""`coatnet bench`: this network against others' at the same work, in turns, beside what the machine can do."""
