"""Studies: one job under several settings and seeds, with statistics of the differences."""
