"""The job directory: what is done so far of a conversion, so that it goes on after a kill to the same bytes."""
