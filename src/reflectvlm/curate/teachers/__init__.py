"""Teachers: a server, a policy, a file, a rule. Each is a file of its own, imported when it is used."""

from reflectvlm.curate.teachers.words import teacher

__all__ = ["teacher"]
