"""The Python runner. See README.md beside this package for the whole contract."""
