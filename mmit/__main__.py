"""`python -m mmit` is the same as `mmit`."""

from mmit.cli import main

main()
