"""Packages that code installs into its home directory."""

import importlib.machinery
import os
import sys


class HomePackages:
    """Asked last, so it costs nothing until an import would fail. `pip install ./x.whl` needs no restart then."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if path is not None:
            return None
        where = os.path.join(os.path.expanduser("~"), ".local/lib/python%d.%d/site-packages" % sys.version_info[:2])
        if where in sys.path or not os.path.isdir(where):
            return None
        sys.path.append(where)
        # It may have been looked for before it was there.
        sys.path_importer_cache.pop(where, None)
        return importlib.machinery.PathFinder.find_spec(name, [where], target)
