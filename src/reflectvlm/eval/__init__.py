"""Benchmarks, their official rules, and the tables that come of them."""
