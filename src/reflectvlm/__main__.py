"""`python -m reflectvlm`."""

from reflectvlm.cli import main

raise SystemExit(main())
