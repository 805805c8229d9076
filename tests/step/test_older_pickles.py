"""Whole optimizers pickled by versions that knew fewer settings and fields of rules."""

import copy
import pickle

import pytest
import torch

import fastsam
from fastsam.step import rule, spec
from fastsam.step.settings import Setting

from test_loading import MAKERS, params_of, run, trained
from two_losses import same

#: Settings that a version from before them has not saved.
NEW = {"ascent_steps", "norm", "repeat_random", "set_to_none", "ascent_context",
       "descent_context", "perturb_every", "start", "stop", "amplify", "scratch"}  # fmt: skip


def older(x, seen=None):
    """A copy as an older version's pickle gives it: without what is new."""
    x = copy.deepcopy(x)
    for one in (x, getattr(x, "optimizer", x)):
        for name in NEW & vars(one).keys():
            del vars(one)[name]
        for kind in ("ascent", "descent"):
            if vars(one).get(kind) is not None:
                for name in ("arguments", "least"):
                    vars(vars(one)[kind]).pop(name, None)
    if isinstance(x, fastsam.LETS):  # a plain number, once
        vars(x)["_steps"] = vars(x).pop("_begun")[0]
    # rules were in a file with a name of the same length
    return pickle.loads(pickle.dumps(x).replace(b"fastsam.step.rule", b"fastsam.step.spec"))


@pytest.mark.parametrize(
    "name",
    ["sam-sgd", "asam-adam", "usam-adam", "vasso-sgd", "samar-rmsprop", "lightsam-1", "lightsam-3",
     "adasam", "lets-adam"],
)  # fmt: skip
def test_they_go_on_with_the_defaults(name):
    optimizer = trained(name)
    resumed = older(optimizer)
    for one in (resumed, getattr(resumed, "optimizer", resumed)):
        settings = {k for cls in type(one).__mro__ for k, x in vars(cls).items()
                    if isinstance(x, Setting)}  # fmt: skip
        assert settings <= vars(one).keys()
    run(resumed), run(optimizer)
    assert all(map(torch.equal, params_of(resumed), params_of(optimizer)))
    assert same(resumed.state_dict(), optimizer.state_dict())
    MAKERS[name](params_of(resumed)).load_state_dict(resumed.state_dict())
    run(pickle.loads(pickle.dumps(resumed)))


def test_what_was_saved_is_kept_and_the_class_knows_the_default():
    """SSAM renormalizes by default, and an argument that was given is not a default."""
    params = [torch.nn.Parameter(torch.ones(3))]
    optimizer = older(fastsam.SSAM(params, torch.optim.SGD, lr=0.1, max_grad_norm=0.5, lam=0.25))
    assert (optimizer.renormalize, optimizer.max_grad_norm, optimizer.lam) == (True, 0.5, 0.25)
    assert (optimizer.ascent_steps, optimizer.norm, optimizer.set_to_none) == (1, "global", True)
    state = optimizer.__getstate__()
    del state["lam"]
    again = fastsam.SSAM.__new__(fastsam.SSAM)
    again.__setstate__(state)
    assert again.lam == 1.0  # USAM's parent would say 0.5


@pytest.mark.parametrize(
    "name",
    ["Ascent", "Descent", "Base", "along_gradient", "_no_ascent_columns", "_no_columns",
     "_no_states"],
)  # fmt: skip
def test_parts_of_rules_are_found_where_they_were(name):
    assert getattr(spec, name) is getattr(rule, name)


def test_rules_without_fields_that_are_new():
    """The default of each, and none that two rules share."""
    whole = fastsam.SAMAR([torch.nn.Parameter(torch.ones(3))], torch.optim.SGD, lr=0.1).descent
    state = {k: v for k, v in vars(whole).items() if k not in ("arguments", "least", "check")}
    rules = []
    for _ in range(2):
        rules.append(type(whole).__new__(type(whole)))
        rules[-1].__setstate__(state)
    assert rules[0].arguments == {} == rules[0].least and rules[0].check is None
    assert rules[0].arguments is not rules[1].arguments
    assert rules[0].scalars == whole.scalars
