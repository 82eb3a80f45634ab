"""python -m aphroquant."""

from aphroquant.cli import main

main()
