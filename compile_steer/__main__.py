"""`python -m compile_steer`."""

from compile_steer.cli import main

main()
