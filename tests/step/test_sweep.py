"""What is worked out once and kept from pass to pass is noticed when it no longer holds."""

import pytest
import torch

import fastsam

from registry import BACKENDS, DEVICE, METHODS, create

SGD = {"base_optimizer": torch.optim.SGD, "lr": 0.1}


def parameters(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(DEVICE)) for s in shapes]


def step(optimizer, params, contiguous=False):
    for half in (optimizer.first_step, optimizer.second_step):
        for p in params:
            grad = torch.sin(3 * p.detach())
            p.grad = grad.contiguous() if contiguous else grad
        half()


def compare(backend, make, change, shapes=((4, 4), (7,), (5, 5)), steps=2, contiguous=False):
    """Steps, a change, and steps again, against the reference backend."""
    results = []
    for name in (backend, "reference"):
        params = parameters(*shapes)
        optimizer = make(params, name)
        for _ in range(steps + 1):
            step(optimizer, params)
        change(optimizer, params)
        for _ in range(steps):
            step(optimizer, params, contiguous)
        results.append([p.detach().double() for p in params])
    for ours, exact in zip(*results, strict=True):  # some steps of float32 arithmetic
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-6)


def shrink(optimizer, params):
    params[1].data = params[1].data[:3]
    params[1].grad = None


def transpose(optimizer, params):
    params[0].data = params[0].data.t()


def replace_state(optimizer, params):
    optimizer.state[params[1]]["momentum_buffer"] = torch.ones_like(params[1])


def clear_state(optimizer, params):
    optimizer.state.clear()


def fill_betas(optimizer, params):
    optimizer.param_groups[0]["betas"][0].fill_(0.1)


def change_betas(optimizer, params):
    optimizer.param_groups[0]["betas"] = (0.2, 0.9)


def fill_lr(optimizer, params):
    optimizer.param_groups[0]["lr"].fill_(0.7)


def turn_on_momentum(optimizer, params):
    optimizer.param_groups[0]["momentum"] = 0.5


def add_group(optimizer, params):
    params += parameters((6,))
    optimizer.add_param_group({"params": params[-1:], "lr": 0.3})


def move_between_groups(optimizer, params):
    add_group(optimizer, params)
    optimizer.param_groups[1]["params"].append(optimizer.param_groups[0]["params"].pop())


def reload(optimizer, params):
    optimizer.load_state_dict(optimizer.state_dict())


def widen(optimizer, params):
    params[2].data = params[2].data.double()
    params[2].grad = None


CHANGES = {
    "shrink": (shrink, {}), "transpose": (transpose, {"adaptive": True}),
    "replace-state": (replace_state, {"momentum": 0.9}),
    "clear-state": (clear_state, {"momentum": 0.9}),
    "momentum": (turn_on_momentum, {}), "add-group": (add_group, {"momentum": 0.9}),
    "move-between-groups": (move_between_groups, {"momentum": 0.9}),
    "reload": (reload, {"momentum": 0.9}), "widen": (widen, {}),
}  # fmt: skip


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
@pytest.mark.parametrize("name", CHANGES)
def test_changes_between_steps(name, backend):
    change, kwargs = CHANGES[name]
    compare(backend, lambda p, b: fastsam.SAM(p, **(SGD | kwargs), backend=b), change)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
@pytest.mark.parametrize("change", [fill_betas, change_betas, fill_lr])
def test_hyper_parameters_that_change_in_place(change, backend):
    def make(params, name):
        betas = (torch.tensor(0.9), torch.tensor(0.99)) if change is fill_betas else (0.9, 0.99)
        lr = torch.tensor(0.1) if change is fill_lr else 0.1
        return fastsam.SAM(params, torch.optim.AdamW, lr=lr, betas=betas, backend=name)

    compare(backend, make, change)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
def test_a_radius_that_was_zero(backend):
    """Steps of one pass and of two take turns, with SAMAR's first gradients in the latter."""

    def make(params, name):
        return fastsam.SAMAR(params, **SGD, momentum=0.9, lam=0.3, rho=0.0, backend=name)

    def change(optimizer, params):
        optimizer.step(lambda: sum(p.square().sum() for p in params).backward())
        optimizer.param_groups[0]["rho"] = 0.05

    compare(backend, make, change, steps=3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.filterwarnings("ignore:some parameters are float16 or bfloat16")
def test_an_empty_parameter_that_was_cast(backend):
    """Its address stays 0; what shows the new dtype is the state that is created next."""
    params = parameters((3,), (0,))
    optimizer = fastsam.SAM(params, torch.optim.Adam, lr=0.1, backend=backend)
    step(optimizer, params)
    params[1].data = params[1].data.bfloat16()
    params[1].grad = None
    del optimizer.state[params[1]]
    step(optimizer, params)
    assert optimizer.state[params[1]]["exp_avg"].dtype == torch.bfloat16


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
def test_gradients_come_and_go(backend):
    results = []
    for name in (backend, "reference"):
        params = parameters((4, 4), (7,), (5,), (20000,))
        optimizer = fastsam.SAM(params, torch.optim.AdamW, lr=0.1, backend=name)
        for number in range(12):
            for half in (optimizer.first_step, optimizer.second_step):
                for k, p in enumerate(params):
                    p.grad = torch.sin(3 * p.detach()) if (number * 5 + k) % 4 else None
                half()
        results.append([p.detach() for p in params])
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-6)


def test_nothing_is_written_past_a_parameter_that_shrank():
    base = torch.ones(4096, device=DEVICE)
    param = torch.nn.Parameter(base)
    optimizer = fastsam.SAM([param], **SGD, backend="triton")
    for _ in range(2):
        step(optimizer, [param])
    param.data, param.grad = param.data[:1024], None
    before = base[1024:].clone()
    step(optimizer, [param])
    assert torch.equal(base[1024:], before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gradient_is_kept(backend):
    import weakref

    for cls in (fastsam.SAM, fastsam.SAMAR, fastsam.VaSSO):
        params = parameters((40, 40), (7,))
        optimizer = cls(params, **SGD, momentum=0.9, backend=backend)
        for _ in range(3):
            for half in (optimizer.first_step, optimizer.second_step):
                for p in params:
                    p.grad = torch.sin(p.detach())
                held = [weakref.ref(p.grad) for p in params]
                half(zero_grad=True)
        assert all(ref() is None for ref in held), cls


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
def test_a_parameter_transposed_where_its_gradient_is_not(backend):
    def make(params, backend):
        return fastsam.SAM(params, **SGD, rho=0.5, backend=backend)

    compare(backend, make, transpose, contiguous=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_that_take_turns(backend):
    """A step of the base alone sees others than the two passes before and after it."""
    one, other = parameters((5,), (3,)), parameters((7,), (2,))
    optimizer = fastsam.SAM(one, **SGD, rho=0.5, backend=backend)
    for _ in range(3):
        optimizer.param_groups[0]["params"] = one
        before = [p.clone() for p in (*one, *other)]
        for _ in range(3):
            step(optimizer, one)
        assert all((p - b).abs().max() > 0.01 for p, b in zip(one, before[:2], strict=True))
        optimizer.param_groups[0]["params"] = other
        for p in other:
            p.grad = torch.sin(3 * p.detach())
        optimizer.plain_step()
        expected = [b - 0.1 * torch.sin(3 * b) for b in before[2:]]
        torch.testing.assert_close([p.detach() for p in other], expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_that_exchange_their_parameters(backend):
    """Not only between two passes' groups, but for a step of the base alone in between."""
    a, d = (torch.nn.Parameter(torch.zeros(4, device=DEVICE)) for _ in range(2))
    optimizer = fastsam.SAM([{"params": [a]}, {"params": [d], "lr": 1.0}], **SGD, backend=backend)

    def set_grads():
        for p in (a, d):
            p.grad = torch.ones_like(p)

    def exchange():
        first, second = optimizer.param_groups
        first["params"], second["params"] = second["params"], first["params"]

    moved = []
    for plain in (False, False, True, False, True):
        before = a[0].item(), d[0].item()
        if plain:
            exchange()
            set_grads()
            optimizer.plain_step()
            exchange()
        else:
            for half in (optimizer.first_step, optimizer.second_step):
                set_grads()
                half()
        moved.append((before[0] - a[0].item(), before[1] - d[0].item()))
    torch.testing.assert_close(
        moved, [(0.1, 1.0), *[(0.1, 1.0), (1.0, 0.1)] * 2], rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("key", ["lr", "rho"])
def test_a_number_in_the_place_of_a_tensor(key, backend):
    """0 above all, which a table may hold where a tensor's value is filled in."""
    param = torch.nn.Parameter(torch.ones(4, device=DEVICE))
    values = {"lr": 0.1, "rho": 0.5} | {key: torch.tensor(0.3, device=DEVICE)}
    optimizer = fastsam.SAM([param], torch.optim.SGD, **values, backend=backend)
    step(optimizer, [param])
    optimizer.param_groups[0][key] = 0.0
    for value, moves in ((0.0, False), (torch.tensor(0.2, device=DEVICE), True), (0.0, False)):
        optimizer.param_groups[0][key] = value
        before = param.detach().clone()
        param.grad = torch.sin(3 * before)
        optimizer.first_step()
        if key == "rho":
            assert (not torch.equal(param, before)) == moves
        param.grad = torch.sin(3 * param.detach())
        optimizer.second_step()
        if key == "lr":
            assert (not torch.equal(param, before)) == moves


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_things_among_the_state(backend):
    """Hooks may keep something there, in any order."""
    params = parameters((5,), (3,))
    optimizer = fastsam.SAM(params, **SGD, momentum=0.9, backend=backend)
    optimizer.state["note"] = 3
    step(optimizer, params)
    step(optimizer, params)
    held = optimizer.state.pop(params[0])
    optimizer.state["note"] = optimizer.state.pop("note")
    optimizer.state[params[0]] = held
    before = [p.clone() for p in params]
    step(optimizer, params)
    assert not any(map(torch.equal, params, before)) and optimizer.state["note"] == 3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", ["sam", "asam", "samar", "lightsam-2", "lightsam-3"])
def test_under_another_default_device(method, backend):
    """What fastsam allocates goes where the parameters are, or where its numbers are made."""
    results = []
    for device in (DEVICE, "meta"):
        params = parameters((70_000,) if backend == "torch" else (50,), (3,))
        with torch.device(device):
            optimizer = create(method, params, backend, METHODS[method].bases[0])
            for _ in range(2):
                step(optimizer, params)
        results.append([p.detach() for p in params])
    torch.testing.assert_close(*results, rtol=0, atol=0)
