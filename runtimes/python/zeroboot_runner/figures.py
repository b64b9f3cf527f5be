"""matplotlib without IPython: figures are shown as PNG, by `show()` or at the end of the cell."""

import importlib.util
import io
import os
import sys


def png(figure):
    image = io.BytesIO()
    figure.savefig(image, format="png", bbox_inches="tight")
    return image.getvalue()


def show_all(display):
    pyplot = sys.modules.get("matplotlib.pyplot")
    if pyplot is None:
        return
    try:
        for number in pyplot.get_fignums():
            display(pyplot.figure(number))
    finally:
        pyplot.close("all")


class Finder:
    """Gives `matplotlib.pyplot` our `show()` when a cell imports it: Agg's own only warns that it cannot show anything."""

    def __init__(self, display):
        self.display = display

    def install(self):
        # No screen is here. Said in the environment, since matplotlib would try all others first.
        os.environ.setdefault("MPLBACKEND", "agg")
        if "matplotlib.pyplot" in sys.modules:
            self.patch(sys.modules["matplotlib.pyplot"])
        else:
            sys.meta_path.insert(0, self)

    def patch(self, pyplot):
        if pyplot.get_backend().lower() == "agg":
            pyplot.show = lambda *_, **__: show_all(self.display)

    def find_spec(self, name, path=None, target=None):
        if name != "matplotlib.pyplot":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                self.patch(module)

            spec.loader.exec_module = exec_module
        return spec
