"""Bridges to other libraries: each module is one library, imported only by whoever uses it."""
