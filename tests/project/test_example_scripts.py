"""The scripts of ``examples``, for a short while each."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch.distributed as dist

import processes

FOLDER = Path(__file__).resolve().parents[2] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_is_short_listed_and_tested():
    names = sorted(path.stem for path in FOLDER.glob("*.py"))
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    tests = Path(__file__).read_text(encoding="utf-8")
    for name in names:
        assert len((FOLDER / f"{name}.py").read_text(encoding="utf-8").splitlines()) <= 80, name
        assert f"[{name}.py]({name}.py)" in text and f'"{name}"' in tests, name
    assert text.count("| [") == len(names)


@pytest.mark.parametrize(("name", "least"), [("batch_norm", 50), ("muon", 50)])
def test_learns(name, least):
    assert load(name).main(epochs=2) > least  # 10 % is chance


def test_complete_saves_and_goes_on(tmp_path, capsys, monkeypatch):
    module, file = load("complete"), tmp_path / "complete.pt"
    save = module.torch.save

    def interrupted(*args):
        save(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(module.torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        module.main(2, checkpoint=file)
    monkeypatch.undo()
    assert module.main(2, checkpoint=file) > 50
    lines = capsys.readouterr().out.splitlines()
    assert [line[:8] for line in lines] == ["epoch 1:", "epoch 2:"]


def test_wrong_labels():
    found = load("noisy_labels").main(epochs=4)
    assert found.keys() == {"SGD", "SAM"} and found["SGD"] > 50


def test_adapters_learn_what_the_network_has_not():
    before, after = load("lora").main(epochs=3)
    assert before < 50 < after  # half of the digits were not in the first training


def test_transformer():
    assert load("transformer").main(steps=6) < math.log(128)


def test_a_resumed_run_has_the_same_bits():
    assert load("resume").main(steps=20)


def on_rank(rank, size, path):
    """What torchrun would run, in a process group that is there already."""
    assert dist.get_world_size() == size
    return load(path).main(epochs=1)


def test_several_processes():
    try:
        found = processes.run(2, on_rank, "several_gpus")
    finally:
        processes.close()
    assert found[0] == found[1] > 50
