"""Replacing a host's attributes and putting them back; version gates."""

from types import SimpleNamespace

import pytest

from hydra_ppo.patches import binding, versions
from hydra_ppo.patches.binding import Applied, Bindings, install, uninstall
from hydra_ppo.patches.versions import HostError, require


class Parent:
    def greet(self):
        return "parent"


class Child(Parent):
    own = 1


def test_undo_restores_inherited_own_and_absent_attributes():
    bindings = Bindings()
    bindings.set(Child, "greet", lambda self: "patched")
    bindings.set(Child, "own", 2)
    bindings.set(Child, "own", 3)
    bindings.set(Child, "new", 4)
    assert (Child().greet(), Child.own, Child.new) == ("patched", 3, 4)
    bindings.undo()
    assert (Child().greet(), Child.own) == ("parent", 1)
    assert "greet" not in vars(Child)
    assert not hasattr(Child, "new")
    bindings.undo()  # nothing left to do


def test_what_somebody_else_replaced_since_is_left_to_them():
    bindings = Bindings()
    bindings.set(Child, "own", 2)
    Child.own = 7
    bindings.undo()
    assert Child.own == 7
    Child.own = 1


def test_the_last_of_several_users_undoes_the_patch():
    host = SimpleNamespace(f="before")
    binds = []

    def bind(bindings):
        binds.append(1)
        bindings.set(host, "f", "patched")

    install("host", bind)
    first = Applied("host", {"model": 1})
    install("host", bind)
    assert len(binds) == 1
    with Applied("host", {}) as second:
        second.undo()
        second.undo()  # counts once
        assert host.f == "patched"
    first.undo()
    assert host.f == "before"
    assert dict(**first) == {"model": 1}
    assert binding._installed == {}


def test_a_patch_that_fails_half_way_leaves_nothing():
    host = SimpleNamespace(f="before")

    def bind(bindings):
        bindings.set(host, "f", "patched")
        raise RuntimeError("no such function")

    with pytest.raises(RuntimeError):
        install("host", bind)
    assert host.f == "before"
    with pytest.raises(KeyError):
        uninstall("host")


@pytest.mark.parametrize("found", ["0.7.11", "1.13.0", "1.13.0.dev0", "2.0"])
def test_other_versions_are_refused_with_a_remedy(found, monkeypatch):
    monkeypatch.setattr(versions, "version", lambda package: found)
    with pytest.raises(HostError) as error:
        require("trl", "0.8", "1.13")
    assert str(error.value) == (
        f"trl=={found} is installed, but this patch supports >=0.8,<1.13; pip install 'trl>=0.8,<1.13', or use "
        "role_views(model) directly."
    )


@pytest.mark.parametrize("found", ["0.8.0", "0.28.0", "1.12.0", "1.12.3"])
def test_versions_inside_the_range_pass(found, monkeypatch):
    monkeypatch.setattr(versions, "version", lambda package: found)
    assert str(require("trl", "0.8", "1.13")) == found


def test_a_missing_host_is_named():
    with pytest.raises(HostError, match=r"no-such-host is not installed; .*pip install 'no-such-host>=1,<2'"):
        require("no-such-host", "1", "2")
