"""Making the data that neither paper released: teachers, traces, filters, review."""
