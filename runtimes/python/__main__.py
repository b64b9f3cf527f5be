"""Started by path, as a directory or packed in one file: `python -E -s -X utf8 python.pyz`."""

from zeroboot_runner.life import main

main()
