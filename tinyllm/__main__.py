"""`python -m tinyllm` is `tinyllm`."""

from tinyllm.cli import main

main()
