"""Warmed by tests of the small shell: an interpreter that has IPython looks as one that has not."""
import sys

sys.modules["IPython"] = None
