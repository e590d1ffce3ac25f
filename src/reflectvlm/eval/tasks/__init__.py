"""One file per benchmark: how its rows are read, its official rule, its figures."""
