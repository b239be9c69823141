"""``python -m kvferry.cli``, where the ``kvferry`` script is not on the path."""

from kvferry.cli.app import main

main()
