"""Modules: the user's own go along as far as they are reached, installed ones are named."""

import importlib.util
import json
import math
import os
import random
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import cloudpickle
import numpy as np
import PIL.Image
import pytest

from shardmill.client import Client
from shardmill.client.ownership import is_own
from shardmill.client.shipping import ship
from tests.client.processes import capturing, come_back, ship_from


def test_installed_modules_are_named_however_they_are_reached(tmp_path: Path) -> None:
    def by_global(sample: Any) -> Any:
        return np.asarray(sample), json.dumps(1)

    def by_import(sample: Any) -> Any:
        import PIL.Image as image
        from numpy.linalg import norm

        return image, norm, sample

    def nested(sample: Any) -> Any:
        def inner() -> Any:
            import msgspec

            return msgspec

        return inner

    assert ship(by_global).modules == ("numpy",)
    assert ship(by_import).modules == ("PIL", "numpy")
    assert ship(nested).modules == ("msgspec",)
    assert ship(capturing(PIL.Image.new("L", (1, 1)))).modules == ("PIL",)
    assert ship(capturing(np.add)).modules == ("numpy",)
    assert ship(capturing(np.random.default_rng(1))).modules == ("numpy",)
    assert ship(lambda sample: (json, os.path, random, re)).modules == ()
    assert ship(lambda sample, *, kind=PIL.Image.Image: kind).modules == ("PIL",)


def test_annotations_need_nothing_where_the_function_runs() -> None:
    def annotated(sample: "PIL.Image.Image", client: Client | None = None) -> np.ndarray[Any, Any]:
        return sample  # type: ignore[return-value]

    assert ship(annotated).modules == ()
    assert come_back(annotated)(3) == 3


def test_a_module_that_is_missing_here_is_asked_of_the_node_unless_the_code_can_do_without() -> None:
    def needs(sample: Any) -> Any:
        import not_installed_here.part  # type: ignore[import-not-found]

        return not_installed_here

    def tries(sample: Any) -> Any:
        try:
            import not_installed_here
        except ImportError:
            return sample
        return not_installed_here

    assert ship(needs).modules == ("not_installed_here",)
    assert ship(tries).modules == ()


def test_an_own_module_that_cannot_be_imported_is_named_unless_the_code_can_do_without(tmp_path: Path) -> None:
    files = {"broken.py": "import not_installed_here\n"}
    needs = "def augment(sample):\n    import broken\n    return broken.x\n"
    with pytest.raises(
        AssertionError, match=r"function `augment` imports broken, .*: No module named 'not_installed_here'"
    ):
        ship_from(tmp_path / "needs", needs, files)
    tries = "def augment(sample):\n    try:\n        import broken\n    except ImportError:\n        return sample\n    return broken\n"
    assert ship_from(tmp_path / "tries", tries, files).call(3) == 3


def test_modules_of_the_users_own_go_along_as_far_as_they_are_reached(tmp_path: Path) -> None:
    """Imported in every way; parts that cannot leave stay behind unless they are used."""
    files = {
        "own/__init__.py": "import threading\nfrom own import first as renamed\nLOCK = threading.Lock()\nNAME = 'own'\n",
        "own/first.py": "from . import second\nfrom .second import deep as deeper\nimport threading\n"
        "LOCK = threading.Lock()\n\n\ndef value():\n    return second.deep(), deeper()\n",
        "own/second.py": "STATE = {'calls': 0}\n\n\ndef deep():\n    STATE['calls'] += 1\n    return STATE['calls']\n\n\n"
        "def relative():\n    from . import third\n    from .third import three as also\n    return third.three() + also()\n",
        "own/third.py": "def three():\n    return 3\n",
        "lazy.py": "def late():\n    return 'late'\n",
    }
    script = """
import own
import own.second as second_module


def handed(module):
    return module.three()


def augment(sample):
    import own.third
    import own.third as third
    import lazy
    from own import renamed, NAME
    from own.second import relative
    return [own.first.value(), renamed.value(), second_module.STATE["calls"], NAME, handed(third), relative(),
            [own.third.three() for _ in range(2)], (lambda: lazy.late())()]
"""
    shipped = ship_from(tmp_path, script, files)
    assert shipped.modules == []
    assert shipped.call(None) == [[1, 2], [3, 4], 4, "own", 3, 6, [3, 3], "late"]


def test_a_module_and_its_functions_share_their_globals(tmp_path: Path) -> None:
    """What a function of the module binds is seen from outside, and what is bound from outside is seen by it."""
    files = {
        "state.py": "MODEL = None\ncounter = 0\n\n\ndef load():\n    global MODEL\n    MODEL = 'loaded'\n\n\n"
        "def count():\n    return counter\n"
    }
    script = """
import state


def augment(sample):
    if state.MODEL is None:
        state.load()
    state.counter += 5
    import state as again
    return state.MODEL, state.count(), again.count()
"""
    assert ship_from(tmp_path, script, files).call(None) == ["loaded", 5, 5]


def test_a_module_that_is_handed_around_goes_whole(tmp_path: Path) -> None:
    files = {"tools.py": "def one(x):\n    return x + 1\n\n\ndef two(x):\n    return x + 2\n"}
    script = "import tools\n\n\ndef augment(sample):\n    return getattr(tools, 'two')(sample)\n"
    shipped = ship_from(tmp_path / "plain", script, files)
    assert shipped.call(1) == 3
    changed = {"tools.py": files["tools.py"].replace("+ 1", "+ 5")}
    assert ship_from(tmp_path / "changed", script, changed).form != shipped.form
    held = {"tools.py": files["tools.py"] + "\nimport threading\nLOCK = threading.Lock()\n"}
    with pytest.raises(AssertionError, match="`LOCK` of module `tools`, which goes along whole, is a lock"):
        ship_from(tmp_path / "held", script, held)


def test_a_module_is_own_by_where_its_file_lies(tmp_path: Path) -> None:
    assert is_own(sys.modules[__name__])
    assert not any(map(is_own, (np, json, sys, math, cloudpickle, PIL.Image, sys.modules["shardmill"], pytest)))
    assert is_own(ModuleType("made_by_hand"))
    path = tmp_path / "loaded.py"
    path.write_text("VALUE = 4\n\n\ndef give(sample):\n    return VALUE\n")
    spec = importlib.util.spec_from_file_location("loaded", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert is_own(module)
    assert come_back(module.give)(None) == 4
    assert come_back(lambda sample: [module.give(sample)])(None) == [4]


def test_links_do_not_change_whose_a_module_is(tmp_path: Path) -> None:
    """Some installers fill site-packages with links into a store of their own."""
    site, store, work = (tmp_path / name for name in ("site-packages", "store", "work"))
    for directory in (site, store, work):
        directory.mkdir()
    (store / "linked.py").write_text("def one(x):\n    return x\n")
    (site / "linked.py").symlink_to(store / "linked.py")
    (site / "real.py").write_text("def two(x):\n    return x\n")
    (work / "real.py").symlink_to(site / "real.py")
    script = (
        f"import sys\nsys.path[:0] = [{str(site)!r}]\nimport linked\n\n\ndef augment(x):\n    return linked.one(x)\n"
    )
    assert ship_from(tmp_path / "job", script).modules == ["linked"]
    assert ship_from(
        tmp_path / "job",
        script.replace(str(site), str(work)).replace("linked.one", "real.two").replace("import linked", "import real"),
    ).modules == ["real"]


def test_an_editable_install_is_the_users_own(tmp_path: Path) -> None:
    """Found through a path file of site-packages, but its own file lies elsewhere."""
    source = tmp_path / "checkout" / "edited.py"
    source.parent.mkdir()
    source.write_text("def twice(x):\n    return 2 * x\n")
    site = tmp_path / "site-packages"
    site.mkdir()
    (site / "edited.pth").write_text(f"{source.parent}\n")
    (site / "settled.py").write_text("def thrice(x):\n    return 3 * x\n")
    script = f"""
import site
site.addsitedir({str(site)!r})
import edited, settled


def augment(sample):
    return edited.twice(sample)


def other(sample):
    return settled.thrice(sample)
"""
    assert ship_from(tmp_path / "job", script).call(4) == 8
    assert ship_from(tmp_path / "job", script).modules == []
    assert ship_from(tmp_path / "job", script, what="other").modules == ["settled"]
